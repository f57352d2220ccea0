"""The Grafana dashboard against Ray's own exporter: what it asks for must be there while a job runs."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
DASHBOARD = Path(__file__).parents[2] / "pipelines" / "grafana.json"
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.M)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(environment: dict[str, str]) -> Iterator[tuple[dict[str, str], str, int]]:
    """A Ray head: the environment of its commands, its address, and the port of its exporter."""
    temporary = tempfile.mkdtemp(prefix="gb", dir="/tmp")
    ports = {name: free_port() for name in ("port", "metrics-export-port", "dashboard-agent-listen-port")}
    options = [f"--{name}={port}" for name, port in ports.items()]
    own = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "metrics-test-token-" + "0" * 32}
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
    command += ["--object-store-memory=100000000", f"--temp-dir={temporary}", *options]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, env=own, stdout=log, stderr=log) as process:
        end = time.monotonic() + 120
        while not exported(ports["metrics-export-port"]) and time.monotonic() < end:
            time.sleep(0.5)
        yield own, f"127.0.0.1:{ports['port']}", ports["metrics-export-port"]
        process.terminate()
        process.wait(30)
    shutil.rmtree(temporary, ignore_errors=True)


def exported(port: int) -> dict[str, dict[str, float]]:
    """Metric -> labels as text -> value, of Prometheus's text format; none while Ray's agent has not begun."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except urllib.error.URLError:
        return {}
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in SAMPLE.findall(text):
        found.setdefault(name, {})[labels] = float(value)
    return found


def asked() -> set[str]:
    """The metrics that the dashboard's queries name."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def test_ray_exports_every_metric_that_the_dashboard_asks_for(
    head: tuple[dict[str, str], str, int], tmp_path: Path
) -> None:
    environment, address, port = head
    captions = tmp_path / "captions.tsv"
    captions.write_text("caption\n\n" + "\n".join(f"picture {number}" for number in range(600)) + "\n")
    store = tmp_path / "out"
    command = [str(BIN / "graphbuild"), "embed", str(store), "--captions", str(captions), "--address", address]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        seen: dict[str, dict[str, float]] = {}
        end = time.monotonic() + 200
        while time.monotonic() < end:
            for name, values in exported(port).items():
                seen.setdefault(name, {}).update(values)
            if process.poll() is not None:
                break
            time.sleep(0.3)
        assert process.stderr is not None
        assert process.wait() == 0, process.stderr.read()
    names = asked()
    assert {name for name in names if "graphbuild" in name} == {
        "ray_graphbuild_items",
        "ray_graphbuild_rejected",
        *(f"ray_graphbuild_tasks_{what}" for what in ("total", "done", "failed", "running", "again")),
    }
    assert names <= seen.keys(), f"not exported: {names - seen.keys()}"
    ours = {labels: value for labels, value in seen["ray_graphbuild_items"].items() if f'store="{store}"' in labels}
    samples = next(value for labels, value in ours.items() if 'unit="samples"' in labels and "captions" in labels)
    assert samples == 600
