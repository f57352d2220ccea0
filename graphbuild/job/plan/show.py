"""A plan in words: a table of stages by machines, sums, what was assumed, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphbuild.errors import ConfigError
from graphbuild.job.plan import machine
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.costs import costs, room
from graphbuild.job.plan.job import Job, finished, job_of, shares_done
from graphbuild.job.plan.rates import Rates, rates_here
from graphbuild.job.steps import steps_of
from graphbuild.recipe import Recipe, resolve
from graphbuild.store.mapped import check_mappings
from graphbuild.store.store import Store

FOOTNOTE = (
    "* computed, not measured: operations and bytes of the code at the GPU maker's published peak rates, so a "
    "lower bound"
)
SHORT_SECONDS, LONG_SECONDS = 60, 2 * 86_400
LOW_SUCCESS = 0.8
BY_SHARD = ("download", "pack", "scan", "assign", "encode", "vectors", "merge", "search", "export", "inline")


def plan_recipe(
    recipe: Recipe, store: Store | None, *, rows: int | None, workers: int | None, on: Sequence[str]
) -> Iterator[str]:
    """The whole recipe on this machine, an H200 and a cluster, or on the machines described by `on`."""
    job = job_of("run", recipe, None, rows)
    if store and resolve(store, "export", {}) == recipe:  # seconds of other settings tell nothing
        job = replace(job, finished=finished(store, steps_of("run", recipe)))
    return plan_job(job, recipe, store, workers, [machine.parse(text) for text in on] or machine.standard(store))


def plan_verb(verb: str, recipe: Recipe, store: Store, workers: int | None, *, force: bool = False) -> Iterator[str]:
    """What a verb would do to a store now, on this machine; what is done already is left out.

    Raises:
        ConfigError: what the verb itself would raise: settings that differ from those of finished work (unless force),
            a stage that has to run first.
    """
    done = shares_done(verb, recipe, store, force=force)
    known = {} if force else finished(store, steps_of(verb, recipe))  # what is forced may have other settings
    return plan_job(replace(job_of(verb, recipe, store), done=done, finished=known), recipe, store, workers)


def plan_job(
    job: Job, recipe: Recipe, store: Store | None, workers: int | None, machines: Sequence[machine.Machine] = ()
) -> Iterator[str]:
    """Two texts: what the job is, at once; and what it takes, after a probe of this machine. machines: others."""
    yield headline(job)
    machines = [replace(one, workers=workers) for one in machines or [machine.here(store)]]
    yield tell(job, recipe, rates_here(store), machines)


def cases(job: Job, recipe: Recipe, rates: Rates, machines: Sequence[machine.Machine]) -> list[tuple[Case, list[Cost]]]:
    """The costs of the job's stages on each machine."""
    made = [Case(job, recipe, one, rates) for one in machines]
    ordered = any(case.engine.ordered for case in made)
    needed = {"base": job.first_new > 0, "order": ordered, "refine": ordered}
    steps = [step for step in steps_of(job.verb, recipe) if needed.get(step.name, True)]
    return [(case, costs(case, steps)) for case in made]


def headline(job: Job) -> str:
    """What the job is, and what is assumed of it."""
    line = f"{job.rows:,} URLs -> {job.samples:,} images" if job.source == "list" else f"{job.samples:,} samples"
    if job.verb not in ("download", "pack"):
        line += f" -> {job.nodes:,} nodes, d = {job.d}, k = {job.k}"
    lines = [f"plan      {line}; {job.shards:,} shard{'s' * (job.shards != 1)}"]
    return "\n".join([*lines, *(f"{'':10}assumed: {line}" for line in job.assumed), ""])


def tell(job: Job, recipe: Recipe, rates: Rates, machines: Sequence[machine.Machine]) -> str:
    """What it takes: a table of stages by machines, sums, and warnings."""
    found = cases(job, recipe, rates, machines)
    widths = (9, 10, 10, 11, *(max(len(one.name) + 3, 12) for one in machines))

    def row(title: str, *cells: str) -> str:
        return f"{title:<10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))

    names = [one.name + ("*" if one.card else "") for one in machines]
    lines = [row("stage", "tasks", "reads", "writes", "GB/worker", *names)]
    for costs_there in zip(*(each for _, each in found), strict=True):
        cost, ram = costs_there[0], max(one.ram for one in costs_there)
        seconds = [duration(one.seconds) + ("*" if one.on_gpu and one.gpu_seconds else "") for one in costs_there]
        cells = [f"{cost.tasks:,}", size(cost.read), size(cost.written), f"{ram / 1e9:.1f}", *seconds]
        lines.append(row(cost.title, *cells) if any(one.tasks for one in costs_there) else row(cost.title, "done"))
    first = found[0][1]
    read, written = (size(sum(getattr(cost, name) for cost in first)) for name in ("read", "written"))
    most = max(cost.ram for _, each in found for cost in each)
    whole = [duration(sum(cost.seconds for cost in each)) for _, each in found]
    lines.append(row("in all", "", read, written, f"{most / 1e9:.1f}", *whole))
    lines.append("")
    if len(machines) > 1:
        lines.append(f"tasks and bytes are those of {machines[0].name}")
    for one, (case, each) in zip(machines, found, strict=True):
        engine, reason = case.choice
        parts = [f"{engine.name} ({reason})"] if any(cost.name == "join" for cost in each) else []
        vram = max((cost.vram for cost in each), default=0)
        parts += [f"up to {size(vram)} of a GPU's memory*"] if vram else []
        if parts:
            lines.append(f"{one.name}: {'; '.join(parts)}")
        lines += [f"WARNING   {one.name}: {line}" for line in warnings(case, each)]
    lines += [f"WARNING   {line}" for line in source_warnings(job)]
    lines.append(f"{'':10}cores as this machine's ({rates.kind}), by measured rates and a probe of it now")
    told = [cost.title for cost in first if cost.tasks and cost.name in job.finished]
    if told:
        lines.append(f"{'':10}{', '.join(told)}: by what this store's finished tasks took")
    if any(one.card for one in machines):
        lines.append(FOOTNOTE)
    return "\n".join(line.rstrip() for line in lines)


def size(value: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    if value >= 1e3:
        return f"{value / 1e3:,.0f} kB"
    return f"{value:.0f} B" if value else "-"


def duration(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86_400:,.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def warnings(case: Case, found: Sequence[Cost]) -> list[str]:
    """Lines for one machine, each with what to do."""
    job, machine = case.job, case.machine
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
            check_mappings(case.engine.mapped_files * job.shards)
        except ConfigError as error:
            lines.append(f"{error.cause}: {error.fix}")
    card = machine.card
    lines += [
        f"{cost.title} takes {cost.vram / 1e9:.0f} GB of the GPU's {card.bytes / 1e9:.0f} GB: a smaller index.memory"
        for cost in todo
        if card and cost.vram > 0.95 * card.bytes
    ]
    need = room(found)
    if machine.disk_bytes is not None and need > machine.disk_bytes:
        lines.append(f"it takes {need / 1e9:,.0f} GB and {machine.disk_bytes / 1e9:,.0f} GB are free: another STORE")
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
