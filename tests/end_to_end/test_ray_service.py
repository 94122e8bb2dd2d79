"""What a RayService hands to Ray Serve becomes the endpoint, without a command of helio beside it."""

from pathlib import Path

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.profile import Profile
from cluster.recipe import load_recipe
from cluster.session import free_ports
from serving.client import Client
from serving.config import APPLICATION
from serving.control import NAME, NAMESPACE
from serving.service import serve_config
from tests.operations.traffic import eventually
from tests.serving.conftest import CLASSES, Direct, picture


def test_serve_builds_the_endpoint_from_its_configuration(ray_cluster: None, tmp_path: Path) -> None:
    registers = ray.remote(num_cpus=0)(Direct).remote(tmp_path / "bundle")
    ray.get(registers.register.remote(tmp_path, "tiny"))
    port = free_ports(1)[0]
    recipe = load_recipe("quickstart", ["name=tiny", "serve.host=0.0.0.0", "serve.keys=none", f"serve.port={port}"])
    profile = Profile(name="within", address="auto", storage=str(tmp_path))
    config = ServeDeploySchema.model_validate(serve_config(recipe, profile))
    try:
        # As KubeRay does it, through the dashboard.
        serve.start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        _get_global_client().deploy_apps(config, _blocking=True)
        assert serve.status().applications[APPLICATION].status == "RUNNING"
        with Client(f"http://127.0.0.1:{port}") as client:
            eventually(client.ready)
            answer = client.predict(picture(1))
            assert answer.label in CLASSES
            assert answer.model["digest"] == ray.get(registers.digest.remote())
            # The actor that counts lives on, though the task that made it has ended.
            eventually(lambda: client.status()["arms"]["champion"]["requests"] == 1)
    finally:
        serve.shutdown()
        ray.kill(ray.get_actor(NAME, NAMESPACE))
        ray.kill(registers)
