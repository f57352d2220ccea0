"""Formulas of the stages from a graph to sidecars, or to tars written once more."""

from __future__ import annotations

import math

from graphbuild.job.plan.case import Case, Cost


def row_bytes(case: Case) -> float:
    """A sidecar's row: what it carries of the embedding, 6 bytes a neighbour, and key, caption and places."""
    job = case.job
    carried = {"int8": job.d + 4, "float16": 2 * job.d, "sketch:64": 64, "none": 0}[case.recipe.export.embeddings]
    return carried + 6.0 * job.k + 40 + job.characters * 0.8


def export(case: Case) -> Cost:
    """Rows gathered by node and written; 100 bytes of a row beside its embedding and neighbours."""
    job, row = case.job, row_bytes(case)
    size = job.samples * row
    held = case.shard_rows * (4 * row + 16.0 * job.d)
    mapped = job.nodes * (2.0 * job.d + 6.0 * job.k)
    return Cost(job.shards, size / job.shards * case.rates.export_byte, size, size, held, mapped)


def inline(case: Case) -> Cost:
    return _copied(case, case.job.shards)


def cluster(case: Case) -> Cost:
    return _copied(case, math.ceil(case.job.samples / case.recipe.export.shard_size))


def _copied(case: Case, tasks: int) -> Cost:
    """Tars written once more: every member read and written, hashed, and the fields beside or inside."""
    job, rates, row = case.job, case.rates, row_bytes(case)
    written = job.tar_bytes + job.samples * row
    seconds = job.samples * (rates.tar_sample + row * rates.export_byte) + written * rates.hash_byte
    return Cost(tasks, seconds / tasks, job.tar_bytes, written, held=4 * job.samples / tasks * (row + 500))


def arrange(case: Case) -> Cost:
    """One task orders all samples: about 40 bytes each, and the lists read at random."""
    job = case.job
    edges = 1.0 * job.nodes * job.k
    return Cost(1, 2 * edges * case.rates.merge_entry, 6 * edges, 8.0 * job.samples, held=40.0 * job.samples)


def scatter(case: Case) -> Cost:
    job = case.job
    size = job.samples * (job.characters + 300.0)
    return Cost(job.shards, case.shard_rows * case.rates.assign_row, size, size, held=size / job.shards)
