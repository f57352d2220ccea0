"""What of a plan will hurt: dead links, idle workers, memory and disk that are not there, days of one stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphbuild.errors import ConfigError
from graphbuild.graph.tasks import MAPPED
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.formulas import FETCH_SECONDS
from graphbuild.job.plan.job import Job
from graphbuild.store.mapped import check_mappings

SHORT_SECONDS, LONG_SECONDS = 60, 2 * 86_400
LOW_SUCCESS = 0.8
BY_SHARD = ("download", "scan", "assign", "encode", "vectors", "codes", "merge", "search", "export", "inline")


def warnings(case: Case, found: Sequence[Cost]) -> list[str]:
    """Lines for one machine, each with what to do."""
    job, machine, recipe = case.job, case.machine, case.recipe
    lines = []
    todo = [cost for cost in found if cost.tasks]
    lasting = [cost for cost in todo if cost.seconds > SHORT_SECONDS]
    by_shard = [cost for cost in lasting if cost.name in BY_SHARD]
    few = [cost for cost in by_shard if cost.tasks < machine.slots(on_device=cost.on_gpu)]
    if few:
        worst = max(few, key=lambda cost: cost.seconds)
        slots = machine.slots(on_device=worst.on_gpu)
        lines.append(
            f"{worst.title} has {worst.tasks:,} tasks for {slots:,} workers: {slots - worst.tasks:,} stand idle; "
            f"a shard_size of {max(job.rows // (4 * slots), 500):,} would busy all"
        )
    config = recipe.download
    waiting = job.rows * FETCH_SECONDS / config.threads
    downloads = job.source == "list" and any(cost.name == "download" for cost in lasting)
    if downloads and waiting > 2 * job.samples * case.rates.image:
        lines.append(f"download waits for answers, not for cores: threads: {2 * config.threads} would nearly halve it")
    per_node = min(machine.slots(), machine.cores * machine.nodes) / machine.nodes
    for cost in sorted(todo, key=lambda cost: -cost.ram):
        workers = min(math.ceil(per_node), cost.tasks)
        if workers * cost.ram > 0.9 * machine.memory_bytes:
            fit = int(0.9 * machine.memory_bytes / cost.ram)
            lines.append(
                f"{cost.title} takes {cost.ram / 1e9:.1f} GB a worker, and {machine.memory_bytes / 1e9:.0f} GB are for "
                f"{workers} on a node: "
                + (f"use --workers {fit * machine.nodes}" if fit else "this needs nodes with more memory")
                + (", or a smaller index.memory" if fit and cost.name == "join" else "")
            )
            break
    if any(cost.name == "join" for cost in todo):
        try:
            check_mappings(MAPPED.get(case.engine.name, 1) * job.shards)
        except ConfigError as error:
            lines.append(f"{error.cause}: {error.fix}")
    card = machine.card
    lines += [
        f"{cost.title} takes {cost.vram / 1e9:.0f} GB of the GPU's {card.bytes / 1e9:.0f} GB: a smaller index.memory"
        for cost in todo
        if card and cost.vram > 0.95 * card.bytes
    ]
    need = sum(cost.written for cost in found)  # scratch of the index too
    if machine.disk_bytes is not None and need > machine.disk_bytes:
        lines.append(f"it writes {need / 1e9:,.0f} GB and {machine.disk_bytes / 1e9:,.0f} GB are free: another STORE")
    for cost in todo:
        if cost.seconds <= LONG_SECONDS:
            continue
        more = "; it can be stopped and resumed at any time"
        if cost.name == "join" and case.engine.name == "exact":
            more = "; --engine partition compares few pairs only" + (" (on CPUs: --device cpu)" if machine.card else "")
        lines.append(f"{cost.title} takes {cost.seconds / 86_400:.1f} days{more}")
    return lines


def source_warnings(job: Job) -> list[str]:
    """How much of the list is gone, by its age."""
    if job.source != "list" or job.success >= LOW_SUCCESS:
        return []
    dead = f"expect images from {job.success:.0%} of the URLs: links of {job.year} die by 6% a year; "
    return [dead + "`graphbuild retry` fetches what fails for a time only"]
