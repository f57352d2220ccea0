"""A plan in words: a table of stages by machines, sums, what was assumed, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graphbuild.job.plan import machine, warn
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.costs import costs
from graphbuild.job.plan.finished import finished, shares_done
from graphbuild.job.plan.job import Job, job_of
from graphbuild.job.plan.rates import Rates, rates_here
from graphbuild.job.steps import steps_of
from graphbuild.recipe import Recipe, resolve

if TYPE_CHECKING:
    from graphbuild.store.store import Store

FOOTNOTE = (
    "* computed, not measured: operations and bytes of the code at the GPU maker's published peak rates, so a "
    "lower bound"
)


def plan_recipe(
    recipe: Recipe, store: Store | None, *, rows: int | None, workers: int | None, on: Sequence[str]
) -> Iterator[str]:
    """The whole recipe on this machine, an H200 and a cluster, or on the machines described by `on`.

    Two texts: what the job is, at once; and what it takes, after a probe of this machine.
    """
    job = job_of("run", recipe, None, rows)
    described = [machine.parse(text) for text in on]
    yield headline(job)
    if store and resolve(store, "export", {}) == recipe:  # seconds of other settings tell nothing
        job = replace(job, finished=finished(store, steps_of("run", recipe)))
    machines = [replace(one, workers=workers) for one in described or machine.standard(store)]
    yield tell(job, recipe, rates_here(store), machines)


def plan_verb(verb: str, recipe: Recipe, store: Store, workers: int | None, *, force: bool = False) -> Iterator[str]:
    """What a verb would do to a store now, on this machine, as `plan_recipe`; what is done already is left out.

    Raises:
        ConfigError: what the verb itself would raise: settings that differ from those of finished work (unless force),
            a stage that has to run first.
    """
    done = shares_done(verb, recipe, store, force=force)
    known = {} if force else finished(store, steps_of(verb, recipe))  # what is forced may have other settings
    return plan_job(replace(job_of(verb, recipe, store), done=done, finished=known), recipe, store, workers)


def plan_job(job: Job, recipe: Recipe, store: Store, workers: int | None) -> Iterator[str]:
    yield headline(job)
    yield tell(job, recipe, rates_here(store), [replace(machine.here(store), workers=workers)])


def cases(job: Job, recipe: Recipe, rates: Rates, machines: Sequence[machine.Machine]) -> list[tuple[Case, list[Cost]]]:
    """The costs of the job's stages on each machine."""
    steps = [step for step in steps_of(job.verb, recipe) if step.name != "base" or job.first_new]
    return [(case, costs(case, steps)) for case in (Case(job, recipe, one, rates) for one in machines)]


def headline(job: Job) -> str:
    """What the job is, and what is assumed of it."""
    line = f"{job.rows:,} URLs -> {job.samples:,} images" if job.source == "list" else f"{job.samples:,} samples"
    if job.verb != "download":
        line += f" -> {job.nodes:,} nodes, d = {job.d}, k = {job.k}"
    lines = [f"plan      {line}; {job.shards:,} shard{'s' * (job.shards != 1)}"]
    return "\n".join([*lines, *(f"{'':10}assumed: {line}" for line in job.assumed), ""])


def tell(job: Job, recipe: Recipe, rates: Rates, machines: Sequence[machine.Machine]) -> str:
    """What it takes: a table of stages by machines, sums, and warnings."""
    found = cases(job, recipe, rates, machines)
    head = [f"{'stage':<10}{'tasks':>9}{'reads':>10}{'writes':>10}{'GB/worker':>11}"]
    head += [f"{one.name + ('*' if one.card else ''):>{_width(one)}}" for one in machines]
    lines = ["".join(head)]
    first = found[0][1]
    for at, cost in enumerate(first):
        columns = [each[at] for _, each in found]
        if not any(one.tasks for one in columns):
            lines.append(f"{cost.title:<10}{'done':>9}")
            continue
        row = f"{cost.title:<10}{cost.tasks:>9,}{size(cost.read):>10}{size(cost.written):>10}"
        row += f"{max(one.ram for one in columns) / 1e9:>11.1f}"
        for one, column in zip(machines, columns, strict=True):
            row += f"{duration(column.seconds) + ('*' if column.on_gpu and column.gpu_seconds else ''):>{_width(one)}}"
        lines.append(row)
    read, written = (sum(getattr(cost, name) for cost in first) for name in ("read", "written"))
    most = max(cost.ram for _, each in found for cost in each)
    total = f"{'in all':<10}{'':>9}{size(read):>10}{size(written):>10}{most / 1e9:>11.1f}"
    for one, (_, each) in zip(machines, found, strict=True):
        total += f"{duration(sum(cost.seconds for cost in each)):>{_width(one)}}"
    lines.append(total)
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
        lines += [f"WARNING   {one.name}: {line}" for line in warn.warnings(case, each)]
    lines += [f"WARNING   {line}" for line in warn.source_warnings(job)]
    lines.append(f"{'':10}cores as this machine's ({rates.kind}), by measured rates and a probe of it now")
    told = [cost.title for cost in first if cost.tasks and cost.name in job.finished]
    if told:
        lines.append(f"{'':10}{', '.join(told)}: by what this store's finished tasks took")
    if any(one.card for one in machines):
        lines.append(FOOTNOTE)
    return "\n".join(line.rstrip() for line in lines)


def _width(one: machine.Machine) -> int:
    return max(len(one.name) + 3, 12)


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
