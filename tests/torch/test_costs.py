"""What the losses cost, counted: the matrices held at once, and how often the host waits for the device.

Memory is counted in a process of its own, by this file as a script: after much else torch's profiler crashes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from graphbuild.torch import CLIPLoss, CWCLLoss, DebiasedLoss, NTXentLoss, SigLIPLoss, SupConLoss, Targets, XSampleLoss
from graphbuild.torch.targets import ALONE

IMAGES = 512
HOST_READS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal")


def targets_of(kind: str | None) -> Targets:
    generator = torch.Generator().manual_seed(1)
    if kind is None:
        return Targets()
    if kind == "embeddings":
        return Targets(embeddings=torch.randn(IMAGES, 8, generator=generator))
    if kind == "labels":
        return Targets(labels=torch.arange(IMAGES) % 100)
    fields = {
        "node": torch.randint(0, 900, (IMAGES,), generator=generator),
        "neighbors": torch.randint(0, 900, (IMAGES, 8), generator=generator),
        "similarities": torch.rand(IMAGES, 8, generator=generator),
        "background": torch.rand(IMAGES, 2, generator=generator) / 10,
        "node_count": torch.full((IMAGES,), 900),
        "sketch": torch.randn(IMAGES, 4, generator=generator) / 4,
    }
    return Targets.from_batch({name: value for name, value in fields.items() if kind == "sketch" or name != "sketch"})


def step(loss: nn.Module, targets: Targets) -> None:
    z = torch.randn(2, IMAGES, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss(z[0], z[1], targets).backward()


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at once while it runs, beyond what was before."""
    with profile(profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


LOSSES: dict[str, tuple[nn.Module, str | None, int, int]] = {  # loss, targets, views; matrices as documented
    "X-Sample, embeddings": (XSampleLoss(), "embeddings", 2, 3),
    "X-Sample, edges": (XSampleLoss(), "background", 2, 3),
    "X-Sample, calibrated": (XSampleLoss(tau_s="calibrated"), "background", 2, 3),
    "NT-Xent": (NTXentLoss(), None, 2, 3),
    "SupCon": (SupConLoss(), "labels", 2, 3),
    "debiased": (DebiasedLoss(), None, 2, 2),
    "CLIP": (CLIPLoss(), None, 1, 4),
    "soft CLIP": (CLIPLoss(tau_s=0.1), "embeddings", 1, 5),
    "CWCL": (CWCLLoss(), "embeddings", 1, 5),
    "SigLIP": (SigLIPLoss(threshold=0.1), "embeddings", 1, 3),
}
BLOCKS = ("sketch", "background")


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_holds_no_more_matrices_than_stated(peaks: dict[str, int], name: str) -> None:
    _, _, views, matrices = LOSSES[name]
    assert matrices - 1 < peaks[name] / (4 * (views * IMAGES) ** 2) < matrices + 0.25


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_of_edges_holds_little_more_than_two_matrices(peaks: dict[str, int], kind: str) -> None:
    assert 1 < peaks[kind] / (4 * IMAGES**2) < 2.4


class HostReads(TorchDispatchMode):
    """Counts the operations whose result the host has to see before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        self.count += masks or name in HOST_READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["embeddings", "labels", "sketch", "background"])
def test_the_host_waits_once_for_the_check_of_the_targets(kind: str) -> None:
    targets = targets_of(kind)
    with HostReads() as reads:
        step(XSampleLoss(), targets)
    assert reads.count == 1
    if kind in BLOCKS:
        with HostReads() as reads:
            step(XSampleLoss(tau_s="calibrated"), targets)
        assert reads.count == 1


def test_the_host_does_not_wait_where_no_targets_are_read() -> None:
    with HostReads() as reads:
        step(NTXentLoss(), Targets())
    assert reads.count == 0


if __name__ == "__main__":
    counted = {name: peak_bytes(lambda: step(loss, targets_of(kind))) for name, (loss, kind, _, _) in LOSSES.items()}  # noqa: B023
    for kind in BLOCKS:
        targets = targets_of(kind)
        counted[kind] = peak_bytes(lambda: targets.block(ALONE))  # noqa: B023
    sys.stdout.write(json.dumps(counted))
