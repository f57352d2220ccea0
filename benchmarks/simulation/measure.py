"""What the model takes from real runs here: requests of tasks to an object store, and the driver's calls of Ray.

    python -m benchmarks.simulation measure

Requests: the job of small tars, in one process, against an S3 server on loopback, with two numbers of shards; counted
where s3fs sends them, by stage, of its first task and of the others. What grows with the shards is told apart. Ray: CPU
seconds of the driver's process for a task of an actor (submit, wait, get, metrics), while it waits for many others.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from typing import Any

SHARDS, ROWS = (4, 12), 48
PUTS = ("put_object", "delete_object", "delete_objects", "create_multipart_upload", "upload_part", "copy_object")
PUTS += ("complete_multipart_upload", "list_objects_v2")  # are priced as such
WAITED = (0, 8_192)  # other refs
TASKS = 200
Counts = dict[str, dict[str, list[float]]]


def requests() -> dict[str, dict[str, tuple[float, float]]]:
    """By stage: get, put and first_get, as work.Requests has them."""
    few, many = (_counted(shards) for shards in SHARDS)
    found = {}
    for stage in few:
        line = {}
        for what in ("get", "put", "first_get"):
            a, b = (counts[stage][what] for counts in (few, many))
            slope = (b - a) / (SHARDS[1] - SHARDS[0])
            slope = slope if slope > 0.4 else 0.0  # what differs by chance grows with nothing
            line[what] = (round(max(a - slope * SHARDS[0], 0.0), 1), round(slope, 2))
        found[stage] = line
    return found


def _counted(shards: int) -> dict[str, dict[str, float]]:
    """In a process of its own, as copies of files and what was opened outlive a job."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.simulation.measure", str(shards)], check=True, stdout=subprocess.PIPE
    )
    result: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _job(shards: int) -> dict[str, dict[str, float]]:
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs.core import S3FileSystem

    from graphbuild.job.verbs import run_verb
    from graphbuild.recipe import resolve
    from graphbuild.runner import workers
    from graphbuild.runner.runner import Runner
    from graphbuild.store.store import Store

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    client.create_bucket(Bucket="jobs")
    for number in range(shards):
        client.put_object(Bucket="jobs", Key=f"tars/{number:05d}.tar", Body=_tar(number))
    counts: dict[tuple[str, str], Counter[str]] = {}
    now: list[Counter[str]] = [Counter()]
    call, perform = S3FileSystem._call_s3, workers.perform

    async def counted(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        now[0]["put" if method in PUTS else "get"] += 1
        return await call(self, method, *arguments, **named)

    def performed(stage: Any, task: Any, store: Any) -> Any:
        now[0] = counts.setdefault((stage.name, task.name), Counter())
        try:
            return perform(stage, task, store)
        finally:
            now[0] = Counter()

    S3FileSystem._call_s3, workers.perform = counted, performed
    store, out = Store("s3://jobs/store"), {}
    with tempfile.TemporaryDirectory() as folder, Runner(workers=0) as runner:
        tempfile.tempdir = folder
        run_verb("embed", resolve(store, "embed", {"shards": "s3://jobs/tars/*.tar"}), store, runner)
        asked = {"engine": "partition", "k": 8, "min_recall": 0.0}
        run_verb("index", resolve(store, "index", asked), store, runner)
        run_verb("export", resolve(store, "export", {}), store, runner)
        tempfile.tempdir = None
    for stage in dict.fromkeys(name for name, _ in counts):
        first, *others = [found for (name, _), found in counts.items() if name == stage]
        rest = {what: sum(one[what] for one in others or [first]) / len(others or [first]) for what in ("get", "put")}
        out[stage] = {**rest, "first_get": max(first["get"] - rest["get"], 0.0) if others else 0.0}
    server.stop()
    return out


def _tar(number: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for row in range(ROWS):
            for ending, content in (("jpg", os.urandom(2_000)), ("txt", f"photo {number} of {row} birds".encode())):
                member = tarfile.TarInfo(f"{number:05d}{row:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def ray_calls() -> dict[str, float]:
    """CPU seconds: task (submit and get, and twice the metrics), wait, and for each ref waited for."""
    import ray

    from graphbuild.graph.index import SEARCH
    from graphbuild.runner.progress import Metrics, State
    from graphbuild.runner.stage import Task
    from graphbuild.store.store import Store

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20, address="local")
    record = {"task": "00000", "facts": {"counts": {"nodes": 10_000}}, "settings": {"k": 32}}
    record["outputs"] = [{"path": "graph/00000.neighbors.npy", "sha256": "0" * 64, "bytes": 1}] * 4

    class Worker:
        def done(self, *work: Any) -> Any:
            return record

        def hold(self) -> None:
            time.sleep(600)

    kind = ray.remote(num_cpus=0.1)(Worker)
    worker, held = kind.remote(), kind.remote()
    task = Task(stage="search", name="00001", settings={"k": 32}, built={"vectors": "0" * 64}, hints={"index": {}})
    store, metrics, state = Store("memory://store"), Metrics("memory://store"), State("search")
    state.counts.update({"nodes": 1, "edges": 1})
    ray.get(worker.done.remote(SEARCH, task, store))
    seconds = {}
    for others in WAITED:
        pending = [held.hold.remote() for _ in range(others)]
        begin = time.process_time()
        waiting = 0.0
        for _ in range(TASKS):
            ref = worker.done.remote(SEARCH, task, store)
            time.sleep(0.005)
            start = time.process_time()
            ready, _ = ray.wait([ref, *pending], num_returns=1)
            waiting += time.process_time() - start
            ray.get(ready[0])
            metrics.show(state)
            metrics.show(state)
        seconds[others] = (time.process_time() - begin) / TASKS, waiting / TASKS
    ray.shutdown()
    (whole, wait), (_, wait_many) = seconds[0], seconds[WAITED[1]]
    return {"task": whole - wait, "wait": wait, "ref": max(wait_many - wait, 0.0) / WAITED[1]}


if __name__ == "__main__":
    print(json.dumps(_job(int(sys.argv[1]))))
