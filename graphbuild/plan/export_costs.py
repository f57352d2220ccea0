"""Formulas of the stages from a graph to sidecars, or to tars written once more."""

from __future__ import annotations

import math
from collections.abc import Callable

from graphbuild.plan.calibration import CALIBRATED
from graphbuild.plan.case import Case, Cost
from graphbuild.plan.job import Job


def row_bytes(job: Job, embeddings: str) -> float:
    """A sidecar's row: what it carries of the embedding, 6 bytes a neighbour, and key, caption and places."""
    carried = {"int8": job.d + 4, "float16": 2 * job.d, "sketch:64": 64, "none": 0}[embeddings]
    return carried + 6.0 * job.k + 40 + job.characters * 0.8


def export(case: Case) -> Cost:
    """Rows gathered by node and written; 100 bytes of a row beside its embedding and neighbours."""
    job = case.job
    row = row_bytes(job, case.recipe.export.embeddings)
    seconds = case.shard_rows * case.rates.export_row * row / CALIBRATED.row_bytes
    return Cost(
        "export",
        "export",
        job.shards,
        seconds,
        job.samples * row,
        job.samples * row,
        held=case.shard_rows * (4 * row + 16.0 * job.d),
        mapped=job.nodes * (2.0 * job.d + 6.0 * job.k),
    )


def copy(name: str, title: str, shards_of: Callable[[Case], int]) -> Callable[[Case], Cost]:
    def formula(case: Case) -> Cost:
        """Tars written once more: every member read and written, hashed, and the fields beside or inside."""
        job = case.job
        tasks = shards_of(case)
        row = row_bytes(job, case.recipe.export.embeddings)
        bytes_ = job.tar_bytes + job.samples * row
        seconds = (
            job.samples * (case.rates.tar_sample + case.rates.export_row) + bytes_ * case.rates.hash_byte
        ) / tasks
        return Cost(name, title, tasks, seconds, job.tar_bytes, bytes_, held=4 * job.samples / tasks * (row + 500))

    return formula


def arrange(case: Case) -> Cost:
    """One task orders all samples: about 40 bytes each, and the lists read at random."""
    job = case.job
    seconds = job.nodes * job.k * case.rates.merge_entry * 2
    return Cost("arrange", "order", 1, seconds, 6.0 * job.k * job.nodes, 8.0 * job.samples, held=40.0 * job.samples)


def scatter(case: Case) -> Cost:
    job = case.job
    size = job.samples * (job.characters + 300.0)
    return Cost(
        "scatter", "places", job.shards, case.shard_rows * case.rates.assign_row, size, size, held=size / job.shards
    )


def new_tars(case: Case) -> int:
    return math.ceil(case.job.samples / case.recipe.export.shard_size)
