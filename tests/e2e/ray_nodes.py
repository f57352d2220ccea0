"""A Ray cluster of several nodes on this machine; each can be lost as a machine is, with all its processes at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.test_runs import alive, descendants

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

small = {"object_store_memory": 100 * 2**20}
port = int(sys.argv[1])
dashboard = {"include_dashboard": True, "dashboard_port": port} if port else {"include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**small, **dashboard, "num_cpus": 0})
print(cluster.address, flush=True)
for line in sys.stdin:
    node = cluster.add_node(num_cpus=int(line), **small)
    print(node.all_processes["raylet"][0].process.pid, flush=True)
cluster.shutdown()
"""
TASK = b"ray::Worker.attempt"


class Nodes:
    """A head without CPUs, where the drivers are, and nodes for the tasks; `raylets`: pids of those that live."""

    def __init__(self, process: subprocess.Popen[str], address: str, environment: dict[str, str]) -> None:
        self.process = process
        self.address = address
        self.environment = environment  # for commands
        self.raylets: list[int] = []

    def add(self, cpus: int = 1) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{cpus}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"no node: {self.process.communicate()[1]}")
        self.raylets.append(int(line))
        return self.raylets[-1]

    def workers(self) -> dict[int, int]:
        """Ray's worker processes: pid -> raylet."""
        return {
            pid: raylet
            for raylet in self.raylets
            for pid, command in descendants(raylet).items()
            if command.startswith("ray::")
        }

    def lose(self, raylet: int) -> int:
        """Kill a node's processes; returns how many."""
        pids = [raylet, *descendants(raylet)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.raylets.remove(raylet)
        return len(pids)


def is_busy(pid: int) -> bool:
    """Whether a worker is in the middle of a task."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(TASK)
    except OSError:
        return False


@contextlib.contextmanager
def ray_nodes(environment: Mapping[str, str], cpus: list[int], *, dashboard_port: int = 0) -> Iterator[Nodes]:
    """Nodes with so many CPUs each, with token authentication as Ray has it by default; 0: no dashboard."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": hashlib.sha256(os.urandom(32)).hexdigest()}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(dashboard_port)],
        env={**environment, **token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            pytest.fail(f"no cluster: {process.communicate()[1]}")
        nodes = Nodes(process, address, token)
        try:
            for count in cpus:
                nodes.add(count)
            yield nodes
        finally:
            left = descendants(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)  # closes its input, on which it waits
            end = time.monotonic() + 5
            while any(map(alive, left)) and time.monotonic() < end:
                time.sleep(0.1)
            for pid in [*left, process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
