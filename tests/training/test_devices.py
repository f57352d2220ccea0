"""Training on another device than the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config import Config, Place
from other_device import CPU, other_device
from train import train


def losses(config: Config, run_dir: Path, device: torch.device) -> list[float]:
    encoder = train(config, run_dir, Place(0, 1, device))
    assert {tensor.device for tensor in encoder.state_dict().values()} == {device}
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "simclr"},
        {"method": "supcon", "optimizer": "lars"},
        {"method": "xsample"},
        {"method": "xsample", "targets": "sketch", "batches": "window"},
        {"method": "xsample", "targets": "background", "chunk": 16},
        {"method": "xsample", "targets": "labels"},
        {"method": "clip", "text": "tower"},
        {"method": "clip_soft"},
        {"method": "clip_soft", "targets": "sketch", "permute_graph": True},
        {"method": "siglip_mask"},
        {"method": "siglip_positive", "targets": "labels"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_run_on_another_device_has_the_losses_of_the_cpu_s(
    scenes_store: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = Config(store=scenes_store, pixels=16, width=8, samples=80, batch_size=40, epochs=2, **options)
    with other_device() as device:
        there = losses(config, tmp_path / "there", device)
    assert there == pytest.approx(losses(config, tmp_path / "here", CPU), rel=1e-5)


def test_an_operation_on_tensors_of_two_devices_is_refused() -> None:
    with other_device() as device:
        here = torch.ones(2, 2)
        there = here.to(device)
        assert (there + torch.tensor(1.0)).sum().item() == 8  # as on a GPU
        assert there[torch.tensor([0, 1])].device == device
        assert there.clone().copy_(here).device == device
        for mixed in (lambda: there @ here, lambda: here[there.long()], lambda: there.mul_(here)):
            with pytest.raises(RuntimeError, match="takes tensors of two devices"):
                mixed()
