"""What `graphbuild retry` would do to a store: the failed tasks that would run, and the URLs that would be fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from graphbuild.job.plan.job import job_of, shares_done
from graphbuild.job.plan.show import plan_job, plan_verb
from graphbuild.job.retry import failed_tasks, nothing_failed
from graphbuild.machine.terminal import counted
from graphbuild.recipe import resolve
from graphbuild.runner.stage import records
from graphbuild.sources.again import Wanted, by_reason
from graphbuild.store.store import Json, Store

MOST_TASKS = 10


def plan_retry(store: Store, wanted: Wanted, workers: int | None) -> Iterator[str]:
    """The texts of a dry run: what would run and be fetched again, and what that takes on this machine.

    Raises:
        ConfigError: what the verb would raise: nothing to retry, an input that changed.
    """
    recipe = resolve(store, "download", {})
    tasks = failed_tasks(recipe, store)
    fetched = bool(records(store, "download"))
    if not tasks and not fetched:
        raise nothing_failed(store)
    known = "download" not in tasks  # what later verbs find
    if not known:
        yield _tasks("download", tasks.pop("download"))
        yield from plan_verb("download", recipe, store, workers)
    if fetched:
        shares_done("download", recipe, store)
        chosen, others = by_reason(store, wanted)
        yield _urls(chosen, others, wanted)
        if again := chosen.total():
            known = False
            job = job_of("download", recipe, rows=again)
            said = ("each gives an image this time",)
            yield from plan_job(
                replace(job, samples=again, nodes=again, success=1.0, assumed=said), recipe, store, workers
            )
    for verb, failures in tasks.items():
        yield _tasks(verb, failures)
    if tasks and known:
        yield from plan_verb(next(iter(tasks)), recipe, store, workers)


def _tasks(verb: str, failed: list[Json]) -> str:
    lines = [f"retry     would run {counted(len(failed), 'failed task')} of {verb} again"]
    lines += [f"{'':14}{record['task']}: {record['cause']}" for record in failed[:MOST_TASKS]]
    if len(failed) > MOST_TASKS:
        lines.append(f"{'':14}... and {len(failed) - MOST_TASKS:,} more")
    return "\n".join([*lines, ""])


def _urls(chosen: Counter[str], others: Counter[str], wanted: Wanted) -> str:
    again, left = chosen.total(), others.total()
    lines = [f"retry     would fetch {again:,} of {again + left:,} failed URLs again", *_by_reason(chosen)]
    if left:
        why = "failed for good (--reason TEXT, --all)" if wanted == "passing" else "failed for other reasons"
        lines += [f"{'':10}and leave {left:,} that {why}", *_by_reason(others)]
    return "\n".join([*lines, ""])


def _by_reason(urls: Counter[str]) -> list[str]:
    return [f"{'':10}{count:6,} {reason}" for reason, count in urls.most_common()]
