"""Which rank this process is, as far as anything tells."""

from __future__ import annotations

import os

import torch.distributed as dist


def live_rank() -> tuple[int, int] | None:
    """Rank and number of ranks, by RANK and WORLD_SIZE or else the process group; None where neither tells.

    One process alone is told nothing, and so is a worker that is started afresh (spawn), or a launcher.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return None
