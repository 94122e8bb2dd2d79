"""What Ray's cluster launcher (`ray up`) makes a cluster from, in a cloud or on machines that are there already."""

from collections.abc import Mapping
from typing import Any

from cluster.nodes import Cloud, Node, NodeGroup, Nodes
from cluster.profile import Profile

Config = dict[str, Any]

TOKEN = "~/.ray/auth_token"
"""Where Ray looks for its token, on the machine that calls `ray up` as on the nodes."""
HEAD = "head"
"""The head's type of node."""
PORTS = "--port=6379 --object-manager-port=8076"
AZURE_IMAGE = "microsoft-dsvm:ubuntu-2204:2204-gen2:latest"
"""Ray's own choice."""


def launcher_config(profile: Profile, nodes: Nodes, cloud: Cloud, environment: Mapping[str, str]) -> Config:
    """The launcher's configuration, with `environment` for every node. Secrets and the token stand in it by name and by
    path."""
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    start = f"ulimit -n 65536; {variables} ray start"
    config: Config = {
        "cluster_name": profile.name,
        "max_workers": sum(group.max_nodes for group in nodes.groups.values()),
        "idle_timeout_minutes": nodes.idle_timeout_s / 60,
        "provider": _provider(cloud),
        "auth": _auth(cloud),
        "file_mounts": {TOKEN: TOKEN},
        "initialization_commands": cloud.initialization_commands,
        "setup_commands": cloud.setup_commands,
        # The dashboard is reached through ssh (`ray dashboard`); the head's CPUs are the cluster's own.
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head {PORTS} --num-cpus=0 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379 --object-manager-port=8076"],
    }
    if profile.image is not None:
        config["docker"] = {
            "image": profile.image,
            "container_name": "helio",
            "pull_before_run": True,
            "run_options": [
                "--ulimit=nofile=65536:65536",
                *([] if profile.is_in_bucket else [f"--volume={profile.storage}:{profile.storage}"]),
                *(f"--env={name}" for name in profile.secrets),
            ],
        }
    if cloud.provider != "local":
        config["head_node_type"] = HEAD
        config["available_node_types"] = {
            HEAD: {"resources": {"CPU": 0}, "node_config": _machine(cloud, nodes.head), "max_workers": 0},
            **{name: _node_type(cloud, group) for name, group in nodes.groups.items()},
        }
    return config


def _provider(cloud: Cloud) -> Config:
    if cloud.provider == "local":
        return {"type": "local", "head_ip": cloud.head_ip, "worker_ips": cloud.worker_ips}
    zone = {"availability_zone": cloud.zone} if cloud.zone else {}
    if cloud.provider == "aws":
        # A node that goes is gone, with what was on its disk.
        return {"type": "aws", "region": cloud.region, **zone, "cache_stopped_nodes": False}
    if cloud.provider == "gcp":
        return {"type": "gcp", "region": cloud.region, **zone, "project_id": cloud.project}
    return {"type": "azure", "location": cloud.region, "resource_group": cloud.resource_group, **zone}


def _auth(cloud: Cloud) -> Config:
    auth = {"ssh_user": cloud.ssh_user}
    if cloud.ssh_private_key:
        auth["ssh_private_key"] = cloud.ssh_private_key
        if cloud.provider == "azure":
            auth["ssh_public_key"] = f"{cloud.ssh_private_key}.pub"
    return auth


def _node_type(cloud: Cloud, group: NodeGroup) -> Config:
    labels = {"ray.io/market-type": "spot" if group.spot else "on-demand"}
    if group.accelerator:
        labels["ray.io/accelerator-type"] = group.accelerator
    gpus = {"GPU": group.gpus} if group.gpus else {}
    return {
        "min_workers": group.min_nodes,
        "max_workers": group.max_nodes,
        "resources": {"CPU": group.cpus, **gpus, **group.resources},
        "labels": labels,
        "node_config": _machine(cloud, group),
    }


def _machine(cloud: Cloud, node: Node) -> Config:
    group = node if isinstance(node, NodeGroup) else None
    spot, gpus = (group.spot, group.gpus) if group is not None else (False, 0)
    if cloud.provider == "aws":
        found = _aws_machine(cloud, node.machine, spot)
    elif cloud.provider == "gcp":
        found = _gcp_machine(cloud, node.machine, spot)
        if group is not None and gpus:
            found["guestAccelerators"] = [{"acceleratorType": group.accelerator, "acceleratorCount": gpus}]
            # A machine with a GPU cannot be moved.
            found.setdefault("scheduling", []).append({"onHostMaintenance": "TERMINATE"})
    else:
        found = _azure_machine(cloud, node.machine, spot)
    return {**found, **node.node_config}


def _aws_machine(cloud: Cloud, machine: str, spot: bool) -> Config:
    return {
        "InstanceType": machine,
        **({"ImageId": cloud.machine_image} if cloud.machine_image else {}),
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": cloud.disk_gb, "VolumeType": "gp3", "Encrypted": True}}
        ],
        # The machine's credentials go to who can write a header, and from a container it is one step more.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        **({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}),
    }


def _gcp_machine(cloud: Cloud, machine: str, spot: bool) -> Config:
    disk = {"diskSizeGb": cloud.disk_gb, "sourceImage": cloud.machine_image}
    return {
        "machineType": machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        **({"scheduling": [{"preemptible": True}]} if spot else {}),
    }


def _azure_machine(cloud: Cloud, machine: str, spot: bool) -> Config:
    parts = (cloud.machine_image or AZURE_IMAGE).split(":")
    image = dict(zip(("imagePublisher", "imageOffer", "imageSku", "imageVersion"), parts, strict=True))
    return {"azure_arm_parameters": {"vmSize": machine, **image, **({"priority": "Spot"} if spot else {})}}
