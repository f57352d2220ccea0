"""The manifests of pipelines/kubernetes: by KubeRay's own schemas, and their job on several Ray nodes here."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.kuberay import faults
from tests.e2e.ray_nodes import ray_nodes
from tests.e2e.test_object_store import S3, same_as_on_disk
from tests.e2e.test_ray_jobs import free_port
from tests.e2e.test_runs import members, s3_server

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
Manifest = dict[str, Any]
PROJECT = Path(__file__).parents[2]
TARS, SAMPLES = 4, 12


def manifests(name: str) -> dict[str, Manifest]:
    """The resources of a file, by kind."""
    text = (PROJECT / f"pipelines/kubernetes/{name}.yaml").read_text()
    return {resource["kind"]: resource for resource in yaml.safe_load_all(text)}


def cluster_of(name: str) -> Manifest:
    found = manifests(name)
    return dict(found["RayCluster"]["spec"] if name == "raycluster" else found["RayJob"]["spec"]["rayClusterSpec"])


def pods(cluster: Manifest) -> dict[str, Manifest]:
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **workers}


@pytest.mark.parametrize(("name", "kind"), [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_the_manifests_are_what_kuberay_takes(name: str, kind: str) -> None:
    manifest = manifests(name)[kind]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert faults(manifest) == []
    for path, value, said in (
        ("workerGroupSpecs.0.maxReplica", 3, "'maxReplica' was unexpected"),
        ("workerGroupSpecs.1.minReplicas", "1", "'1' is not of type 'integer'"),
        ("headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("headGroupSpec.template.spec.containers.0.resources.limits.memory", "16 GB", "does not match"),
        ("headGroupSpec.template.spec.containers.0.envForm", [], "'envForm' was unexpected"),
        ("authOptions.mode", "tokens", "'tokens' is not one of"),
        ("autoscalerOptions.version", "v3", "'v3' is not one of"),
        ("workerGroupSpecs.0.template.spec.tolerations.0.effects", "NoSchedule", "'effects' was unexpected"),
    ):
        broken = copy.deepcopy(manifest)
        *way, last = path.split(".")
        place: Any = broken["spec"] if kind == "RayCluster" else broken["spec"]["rayClusterSpec"]
        for step in way:
            place = place[int(step)] if step.isdecimal() else place[step]
        place[last] = value
        assert said in " ".join(faults(broken)), path


def test_the_jobs_cluster_is_the_one_that_stays_and_has_this_projects_ray() -> None:
    cluster = cluster_of("raycluster")
    assert cluster_of("rayjob") == cluster
    assert manifests("rayjob")["ServiceAccount"] == manifests("raycluster")["ServiceAccount"]
    assert f"\nray=={cluster['rayVersion']}\n" in (PROJECT / "constraints.txt").read_text()
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert cluster["enableInTreeAutoscaling"]
    assert all(0 < group["minReplicas"] <= group["replicas"] < group["maxReplicas"] for group in groups.values())
    found = pods(cluster)
    for name, pod in found.items():
        (container,) = pod["containers"]
        image = "gpu" if name == "gpu" else "cpu"
        assert container["image"] == f"graphbuild:{image}"
        assert f"-t graphbuild:{image} " in (PROJECT / f"docker/Dockerfile.{image}").read_text()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
        spot = {tolerated["key"]: tolerated.get("value") for tolerated in pod.get("tolerations", [])}.items()
        assert pod.get("nodeSelector", {}).items() <= spot, "a pod bears what its nodes are marked with"
        assert bool(pod.get("nodeSelector")) == (name != "head"), "workers may be lost, the driver is not"


def test_what_the_manifests_need_is_made_by_the_commands_of_the_readme() -> None:
    readme = (PROJECT / "pipelines/README.md").read_text()
    job, cluster = manifests("rayjob"), cluster_of("rayjob")
    secrets = dict(re.findall(r"kubectl create secret generic (\S+) --from-literal (\w+)=", readme))
    assert secrets.pop(cluster["authOptions"]["secretName"]) == "auth_token", "the key that KubeRay reads"
    for pod in pods(cluster).values():
        assert pod["serviceAccountName"] == job["ServiceAccount"]["metadata"]["name"]
        assert [source["secretRef"]["name"] for source in pod["containers"][0]["envFrom"]] == list(secrets)
    (volume,) = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == job["ConfigMap"]["metadata"]["name"]
    assert f"kubectl create configmap {volume['configMap']['name']} --from-file job.yaml" in readme
    for name in ("raycluster", "rayjob"):
        assert f"kubectl apply -f pipelines/kubernetes/{name}.yaml" in readme


@pytest.mark.slow
def test_the_job_of_the_manifest_runs_on_a_cluster_of_several_nodes_and_a_store_on_s3(
    pictures: list[Picture], write_tar: WriteTar, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    job, ray, port = manifests("rayjob"), Path(sys.executable).with_name("ray"), free_port()
    head = cluster_of("rayjob")["headGroupSpec"]["template"]["spec"]["containers"][0]
    (tmp_path / "recipes").mkdir()
    for name, text in job["ConfigMap"]["data"].items():
        (tmp_path / "recipes" / name).write_text(text)
    folder = head["volumeMounts"][0]["mountPath"]
    entrypoint = job["RayJob"]["spec"]["entrypoint"].replace(folder, f"{tmp_path}/recipes")
    recipe = yaml.safe_load(job["ConfigMap"]["data"]["job.yaml"])
    ((bucket, pattern),) = re.findall(r"s3://([^/]+)/(\S+)", recipe["embed"]["shards"])
    (store,) = re.findall(r"s3://\S+", entrypoint)
    assert store.startswith(f"s3://{bucket}/")
    with s3_server() as (client, credentials):
        client.create_bucket(Bucket=bucket)
        for number in range(TARS):
            tar = tmp_path / "tars" / f"{number:05d}.tar"
            write_tar(tar, members(list(enumerate(pictures))[number * SAMPLES : (number + 1) * SAMPLES]))
            client.upload_file(str(tar), bucket, pattern.replace("*", tar.stem))
        env = {**environment, **credentials, "PATH": f"{ray.parent}:{environment['PATH']}"}
        with ray_nodes(env, [1, 1], dashboard_port=port) as nodes:
            env, address = {**env, **nodes.environment}, f"http://127.0.0.1:{port}"
            end = time.monotonic() + 60
            while subprocess.run([ray, "job", "list", "--address", address], env=env, capture_output=True).returncode:
                assert time.monotonic() < end
                time.sleep(1)
            time.sleep(5)  # the job agent comes up after the dashboard
            submit = [ray, "job", "submit", "--address", address, "--", *shlex.split(entrypoint)]
            done = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        found = S3(client, credentials, "").objects(store.removeprefix(f"s3://{bucket}/"), bucket)
    recipe["embed"]["shards"] = f"{tmp_path}/tars/*.tar"
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(recipe))
    cli("run", tmp_path / "here.yaml", tmp_path / "store", "--workers", 0)
    same_as_on_disk(found, tmp_path / "store")
