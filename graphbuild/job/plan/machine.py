"""The machines that a plan is made for: this one, one with a GPU, a cluster, or one described by the user.

Cores are taken to be like this machine's (rates.py). Of GPUs nothing is measured: GPUS holds the makers'
published peak rates, without sparsity, and what is computed from them says so.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import Literal

import psutil
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

from graphbuild.errors import ConfigError
from graphbuild.job.plan.rates import nearest_folder
from graphbuild.machine.gpus import cores_here, gpu_here
from graphbuild.machine.terminal import counted
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


@dataclass(frozen=True)
class Machine:
    """`nodes` nodes of `cores` cores, `gpus` GPUs, `memory_bytes` and a link of `network` bytes/s each; disk_bytes:
    free in the store's place, None: not known; `shared`: its store is reached over the network."""

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
    def name(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        gpus = f" + {self.gpus} {self.gpu.upper()}" if self.gpu else ""
        return f"{nodes}{counted(self.cores, 'core')}{gpus}{' here' if self.own else ''}"

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


class Described(BaseModel, extra="forbid"):
    """What `--on` tells of each node: memory and disk in GB, network in Gbit/s."""

    cores: PositiveInt
    nodes: PositiveInt = 1
    gpus: PositiveInt | None = None
    gpu: Literal["h200", "h100", "a100", "l4"] | None = None
    memory: PositiveFloat | None = None
    disk: PositiveFloat | None = None
    network: PositiveFloat | None = None


def here(store: Store | None = None) -> Machine:
    """This machine, and the disk that the store is on; its GPUs where torch can use them and GPUS knows them."""
    import torch

    folder = nearest_folder(store)
    disk = float(shutil.disk_usage(folder).free) if folder else None
    words = re.split(r"[\W_]+", torch.cuda.get_device_name().lower()) if gpu_here() else []  # NVIDIA A100-SXM4-80GB
    gpu = next((known for known in GPUS if known in words), None)
    gpus = torch.cuda.device_count() if gpu else 0
    return Machine(1, cores_here(), float(psutil.virtual_memory().total), 1e9 / 8, gpus, gpu, disk, own=True)


def standard(store: Store | None) -> list[Machine]:
    """What a plan shows when it is asked for nothing else: this machine (or two cores of its kind), one H200, and a
    cluster of 32 nodes."""
    own = here(store)
    others = [] if own.cores == 2 else ["cores=2,memory=16"]
    others += ["cores=16,memory=128,gpus=1,gpu=h200,network=10", "nodes=32,cores=32,memory=128,network=25"]
    return [own, *map(parse, others)]


def parse(text: str) -> Machine:
    """A description, as in `nodes=32,cores=64,memory=256,gpus=8,gpu=h100,network=25` (`Described`)."""
    try:
        node = Described(**dict(part.strip().lower().partition("=")[::2] for part in text.split(",")))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"--on {text}: {wrong['loc'][0]}: {wrong['msg']}",
            "describe a node, as in --on nodes=32,cores=64,memory=256,gpus=8,gpu=h100,network=25",
        ) from None
    gpu = node.gpu or ("h100" if node.gpus else None)
    gpus = node.gpus or (1 if gpu else 0)
    memory = (node.memory or 4 * node.cores) * 1e9
    network = (node.network or (10 if node.nodes > 1 else 1)) * 1e9 / 8
    disk = node.disk * 1e9 if node.disk else None
    return Machine(node.nodes, node.cores, memory, network, gpus, gpu, disk)
