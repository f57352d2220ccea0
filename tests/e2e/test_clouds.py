"""The clusters of pipelines/clouds: by what `ray up` checks, and by the clouds' own models where they are here."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT = Path(__file__).parents[2]
CLOUDS = {path.stem: path for path in sorted((PROJECT / "pipelines/clouds").iterdir())}
STORES = {"aws": "s3", "azure": "az", "gcp": "gs"}


def cluster(cloud: str) -> dict[str, Any]:
    return dict(yaml.safe_load(CLOUDS[cloud].read_text()))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_cluster_is_what_ray_up_takes(cloud: str) -> None:
    validate_config(prepare_config(cluster(cloud)))
    for path, value, said in (
        ("max_worker", 3, "'max_worker' was unexpected"),
        ("docker.images", "x", "'images' was unexpected"),
        ("available_node_types.cpu.resources.CPU", "16", "'16' is not of type 'integer'"),
        ("available_node_types.cpu.min_worker", 1, "'min_worker' was unexpected"),
        ("auth.ssh_users", "x", "'ssh_users' was unexpected"),
    ):
        broken = copy.deepcopy(cluster(cloud))
        *way, last = path.split(".")
        place = broken
        for step in way:
            place = place[step]
        place[last] = value
        with pytest.raises(jsonschema.ValidationError, match=re.escape(said)):
            validate_config(prepare_config(broken))


def test_nodes_of_aws_are_what_ec2_takes_and_those_of_azure_what_rays_template_takes() -> None:
    run_instances = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    check = botocore.validate.ParamValidator()
    for name, node in cluster("aws")["available_node_types"].items():
        asked = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        assert not check.validate(asked, run_instances.input_shape).has_errors(), name
    assert check.validate({**asked, "InstanceMarket": {}}, run_instances.input_shape).has_errors()
    template = Path(ray.autoscaler.__file__).parent / "_private/_azure/azure-vm-template.json"
    known = json.loads(template.read_text())["parameters"].keys()
    for node in cluster("azure")["available_node_types"].values():
        assert node["node_config"]["azure_arm_parameters"].keys() <= known


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_may_be_lost_the_driver_may_not_and_all_have_the_image_and_the_token(cloud: str) -> None:
    found = cluster(cloud)
    nodes = found["available_node_types"]
    assert nodes[found["head_node_type"]]["resources"] == {"CPU": 0}, "no tasks"
    spot = re.compile("spot|preemptible", re.I)
    assert [name for name, node in nodes.items() if spot.search(json.dumps(node))] == ["cpu"]
    assert found["docker"]["image"].endswith("/graphbuild:cpu")
    dockerfile = (PROJECT / "docker/Dockerfile.cpu").read_text()
    assert "RAY_AUTH_MODE=token" in dockerfile
    assert found["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in found["setup_commands"]:
        (constraints,) = re.findall(r"-c (\S+)/constraints.txt", command)
        assert f"WORKDIR {constraints}\n" in dockerfile


def test_the_page_says_how_each_is_started_and_given_a_job() -> None:
    page = (PROJECT / "pipelines/README.md").read_text().split("## On AWS")[1].split("\n## ")[0]
    assert "ray get-auth-token --generate" in page
    (submitted,) = re.findall(r"^ray job submit .* -- graphbuild run (\S+) \S+", page, re.M)
    for cloud, path in CLOUDS.items():
        assert Path(submitted).parent == Path("/etc/graphbuild")
        assert "/etc/graphbuild" in cluster(cloud)["file_mounts"]
        assert f"{STORES[cloud]}://" in page
        assert path.name in page
