"""What a RayService hands to Ray Serve becomes the endpoint, without a command of helio beside it."""

import signal
import subprocess
import sys
from pathlib import Path

import ray
import yaml
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


def test_what_a_killed_deploy_has_left_is_ended_by_the_next_one(ray_cluster: None, tmp_path: Path) -> None:
    made = ray.remote(num_cpus=0)(Direct).remote(tmp_path / "bundle")
    ray.get(made.digest.remote())
    ray.kill(made)
    port = free_ports(1)[0]
    profile = {"name": "lab", "address": ray.get_runtime_context().gcs_address, "storage": str(tmp_path)}
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(profile))
    words = ["--bundle", str(tmp_path / "bundle"), "--profile", str(tmp_path / "lab.yaml"), f"serve.port={port}"]
    command = [str(Path(sys.executable).with_name("helio")), "deploy", "quickstart", *words]
    with Client(f"http://127.0.0.1:{port}") as client:
        for end in (signal.SIGKILL, signal.SIGINT):
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert process.stdout.readline().startswith(client.url)
                assert client.predict(picture(1)).label in CLASSES
                process.send_signal(end)
    assert process.returncode == 0 and not client.ready()
