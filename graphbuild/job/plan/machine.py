"""The machines that a plan is made for: this one, one with a GPU, a cluster, or one described by the user.

Cores are taken to be like this machine's (rates.py). Of GPUs nothing is measured: GPUS holds the makers'
published peak rates, without sparsity, and what is computed from them says so.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

import psutil

from graphbuild.errors import ConfigError
from graphbuild.job.plan.rates import nearest_folder
from graphbuild.machine.gpus import cores_here, gpu_here
from graphbuild.store.store import Store


@dataclass(frozen=True)
class Gpu:
    """Published peaks: bfloat16 FLOP/s and int8 OP/s of the tensor cores, dense; bytes/s and bytes of its memory."""

    bfloat16: float
    int8: float
    bytes_second: float
    bytes: float


GPUS = {  # the makers' data sheets; "with sparsity" halved
    "h200": Gpu(989e12, 1979e12, 4.8e12, 141e9),
    "h100": Gpu(989e12, 1979e12, 3.35e12, 80e9),
    "a100": Gpu(312e12, 624e12, 2.0e12, 80e9),
    "l4": Gpu(121e12, 242e12, 0.3e12, 24e9),
}
KEYS = {"nodes": int, "cores": int, "gpus": int, "gpu": str, "memory": float, "disk": float, "network": float}


@dataclass(frozen=True)
class Machine:
    """`nodes` nodes of `cores` cores, `gpus` GPUs, `memory_bytes` and a link of `network` bytes/s each; disk_bytes:
    free in the store's place, None: not known; `shared`: its store is reached over the network."""

    name: str
    nodes: int
    cores: int
    memory_bytes: float
    network: float
    gpus: int = 0
    gpu: str | None = None
    disk_bytes: float | None = None
    workers: int | None = None
    own: bool = False  # this one, not one that is only described

    @property
    def shared(self) -> bool:
        return self.nodes > 1

    @property
    def card(self) -> Gpu | None:
        return GPUS[self.gpu] if self.gpu and self.gpus else None

    def slots(self, *, on_device: bool = False) -> int:
        """Tasks that run at a time: one a GPU or core; `--workers` bounds them."""
        most = self.nodes * (self.gpus if on_device and self.card else self.cores)
        if self.workers is None:
            return most
        return max(min(self.workers, most) if on_device and self.card else self.workers, 1)


def here(store: Store | None = None) -> Machine:
    """This machine, and the disk that the store is on; its GPUs where torch can use them and GPUS knows them."""
    folder = nearest_folder(store)
    disk = float(shutil.disk_usage(folder).free) if folder else None
    memory = float(psutil.virtual_memory().total)
    gpus, gpu = gpus_here()
    cores = cores_here()
    name = f"{_count(cores, 'core')}{f' + {gpus} {gpu.upper()}' if gpu else ''} here"
    return Machine(name, 1, cores, memory, 1e9 / 8, gpus, gpu, disk, own=True)


def gpus_here() -> tuple[int, str | None]:
    import torch

    if not gpu_here():
        return 0, None
    words = re.split(r"[\W_]+", torch.cuda.get_device_name().lower())  # as in NVIDIA A100-SXM4-80GB
    gpu = next((known for known in GPUS if known in words), None)
    return (torch.cuda.device_count(), gpu) if gpu else (0, None)


def standard(store: Store | None) -> list[Machine]:
    """What a plan shows when it is asked for nothing else: this machine (or two cores of its kind), one H200, and a
    cluster of 32 nodes."""
    own = here(store)
    others = [] if own.cores == 2 else ["cores=2,memory=16"]
    others += ["cores=16,memory=128,gpus=1,gpu=h200,network=10", "nodes=32,cores=32,memory=128,network=25"]
    return [own, *map(parse, others)]


def parse(text: str) -> Machine:
    """A description, as in `nodes=32,cores=64,memory=256,gpus=8,gpu=h100,network=25`: of each node; memory and disk in
    GB, network in Gbit/s (default 1, on more than one node 10)."""
    given: dict[str, float | str] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in KEYS or not value:
            raise ConfigError(
                f"--on {text}: {part.strip()!r} is none of {', '.join(f'{key}=...' for key in KEYS)}",
                "describe a node, as in --on nodes=32,cores=64,memory=256,gpus=8,gpu=h100,network=25",
            )
        try:
            given[name] = KEYS[name](value)
        except ValueError:
            raise ConfigError(f"--on {text}: {part.strip()!r} is no number", "as in cores=64") from None
    gpu = str(given.get("gpu", "h100")).lower() if given.get("gpus") or given.get("gpu") else None
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--on {text}: no figures are known of gpu={gpu}", f"take one of {', '.join(GPUS)}")
    numbers = {name: float(value) for name, value in given.items() if name != "gpu"}
    if min(numbers.values(), default=1) <= 0 or "cores" not in numbers:
        raise ConfigError(f"--on {text}: cores=... is needed, and nothing may be 0", "as in --on cores=16,memory=64")
    nodes, cores, gpus = int(numbers.get("nodes", 1)), int(numbers["cores"]), int(numbers.get("gpus", 1 if gpu else 0))
    name = f"{nodes} x {_count(cores, 'core')}" if nodes > 1 else _count(cores, "core")
    name += f" + {gpus} {gpu.upper()}" if gpu else ""
    memory = numbers.get("memory", 4.0 * cores) * 1e9
    network = numbers.get("network", 10 if nodes > 1 else 1) * 1e9 / 8
    disk = numbers["disk"] * 1e9 if "disk" in numbers else None
    return Machine(name, nodes, cores, memory, network, gpus, gpu, disk)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
