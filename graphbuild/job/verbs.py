"""Bringing a verb's steps up to date: what runs, what is taken away before it, and when scratch goes."""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from graphbuild.errors import ConfigError, StageError
from graphbuild.job.steps import STEPS, Step, folders, meet, pattern_of, readers, readers_of, served, steps_of
from graphbuild.machine.versions import version_of
from graphbuild.recipe import Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, records, state_path, write_manifest
from graphbuild.runner.state import are_finished, invalidate, is_done, pending, write_recipe
from graphbuild.store.layout import STATE
from graphbuild.store.leftovers import remove_leftovers
from graphbuild.store.remote import READERS
from graphbuild.store.store import Json, Store

PACKAGES = (
    "graphbuild",
    "numpy",
    "torch",
    "pyarrow",
    "polars",
    "ray",
    "sentence-transformers",
    "transformers",
    "openvino",
    "img2dataset",
    "webdataset",
)


def run_verb(verb: str, recipe: Recipe, store: Store, runner: Runner, *, force: bool = False) -> Json:
    """Bring every step of a verb up to date; returns the manifest. Nothing is written before the first plan holds.

    Raises:
        ConfigError: finished work was made with other settings or of another source, and force is not given.
        InputError, StageError, QualityError: as the stages say.
    """
    steps = steps_of(verb, recipe)
    refuse_mixed(steps[0], store)
    for step in steps:
        step.stage.check(recipe)
    first = next((step for step in steps if step.reads_outside), steps[0])
    replaced = replaced_by(first, first.stage.plan(recipe, store), store, force=force)
    store.check_writable()
    if store.is_local:
        remove_leftovers(store.root)
    known: dict[str, bool] = {}
    for step in steps:
        if step.reads_outside and step is not first:
            replaced = replaced_by(step, step.stage.plan(recipe, store), store, force=force)
        while replaced:  # the source's own records last: they tell a removal that was cut short
            remove_step(replaced.pop(), store)
        run_step(step, recipe, store, runner, force=force, known=known)
    write_recipe(recipe, store)
    manifest = store.manifest()
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    made_with = {"versions": versions, "recipe": hashlib.sha256(store.read_bytes("recipe.yaml")).hexdigest()}
    if manifest != {**manifest, **made_with}:
        manifest |= made_with
        write_manifest(store, manifest)
    if store.is_local:  # of workers that died meanwhile
        remove_leftovers(store.root)
    return manifest


def refuse_mixed(step: Step, store: Store) -> None:
    """StageError where finished steps of verbs before a step's have other records than the manifest was made from, as
    after two commands that wrote at once; ConfigError for a manifest of another format. Reads all their records."""
    entries = store.manifest()["stages"]
    for earlier in itertools.takewhile(lambda other: other.verb != step.verb, STEPS):
        if earlier.name in entries and not are_finished(entries[earlier.name], records(store, earlier.name)):
            raise StageError(
                f"{store.url}: the records in {STATE.format(earlier.name)}/ are not those that manifest.json was made "
                "from: a task is missing, or of other settings",
                f"run `graphbuild {earlier.verb} {store.url}` again: it says what differs; --force builds that anew",
            )


def run_step(
    step: Step,
    recipe: Recipe,
    store: Store,
    runner: Runner,
    *,
    force: bool = False,
    stage: Stage | None = None,
    known: dict[str, bool] | None = None,
) -> None:
    """Bring one step up to date. stage: in place of the step's own, with more tasks. known: as for `is_spared`."""
    if is_spared(step, recipe, store, force=force, known=known):
        return
    stale, unread = [other.name for other in readers(step)], _unread(step, recipe, store, force=force)
    runner.run(stage or step.stage, recipe, store, force=force, stale=stale, unread=unread)
    if known is not None and step.name in runner.ran:
        known.clear()
    for folder in (folder for other in STEPS for folder, last in folders(other).items() if last is step):
        store.remove_folder(folder)
    scratch = [other for other in STEPS if other.stage.scratch and served(other)[-1] is step]
    for other in scratch:  # what is left of it, and its records
        remove_step(other, store)
    for folder in {other.owns.partition("/")[0] for other in scratch if other.owns}:
        store.remove_folder(folder)


def is_spared(step: Step, recipe: Recipe, store: Store, *, force: bool, known: dict[str, bool] | None = None) -> bool:
    """Whether a step makes scratch, and all that it is for is there. known: whether that is, by step, of those that
    were looked at since one has run; with many shards a look takes a while."""
    known = {} if known is None else known
    for other in served(step) if step.stage.scratch else ():
        if other.name not in known:
            known[other.name] = is_done(other.stage, recipe, store, force=force)
        if not known[other.name]:
            return False
    return step.stage.scratch


def _unread(step: Step, recipe: Recipe, store: Store, *, force: bool) -> list[str]:
    """The folders of a step's scratch whose readers are all done, steps or tasks, so that they may be gone."""

    def is_over(reader: Step) -> bool:
        if reader.name not in store.manifest()["stages"]:
            return False
        unread = _unread(reader, recipe, store, force=force)
        return is_done(reader.stage, recipe, store, force=force, unread=unread)

    over = {folder for folder in folders(step) if all(map(is_over, readers_of(folder, step)))}
    for folder in folders(step).keys() - over if step.name in store.manifest()["stages"] else ():
        for stage in (reader.stage for reader in readers_of(folder, step) if reader.stage.frees):
            tasks = stage.plan(recipe, store)
            todo = pending(stage, tasks, records(store, stage.name), store, force=force, remove=False)
            over |= {freed for task in tasks for freed in task.frees} - {freed for task in todo for freed in task.frees}
    return sorted(over)


def replaced_by(step: Step, tasks: Sequence[Task], store: Store, *, force: bool) -> list[Step]:
    """The steps whose work must go before these tasks of a step may run: where finished work was made of another
    source, all steps of its verb and of later ones, and of a verb that makes the same files. Another source is one of
    another kind, or one of the same kind with none of its files. Records of a step that excludes this one decide: what
    both wrote may be of either. Nothing is removed here.

    Raises:
        ConfigError: there is such work, and force is not given.
    """
    files = " ".join(other.owns for other in STEPS if other.verb == step.verb)
    verbs = {other.verb for other in STEPS if other.verb == step.verb or meet(other.owns, files)}
    sources = [other for other in STEPS if other.verb in verbs and other.reads_outside]
    makers = [other for other in sources if other.finished(store)]
    if step not in sources or not makers or not tasks:
        return []
    if makers == [step] and all(other is step or other.verb != step.verb for other in sources):
        return []  # what a verb of one kind of source has changed, `pending` tells
    maker = next((other for other in makers if other is not step), step)
    done, now = maker.finished(store), _source(vars(tasks[0]))
    found = (record for path in sorted(done) if (record := store.read_jsons({path: done[path]})[0]) is not None)
    before = next(map(_source, found), now)
    kept = {state_path(step.name, task.name) for task in tasks} & done.keys()
    if maker is step and before == now and kept:
        return []
    gone = STEPS[next(number for number, other in enumerate(STEPS) if other.verb in verbs) :]
    if not force:
        owned = [pattern.split("#")[0] for other in gone if other.finished(store) for pattern in other.owns.split()]
        raise ConfigError(
            f"{store.url} was made from {before}, and this is another source ({now}), which would replace:\n    "
            + ", ".join(dict.fromkeys(path for path in owned if not path.startswith("_"))),
            "use another STORE, or add --force to replace these files"
            + (
                f"; tars that were only moved: `graphbuild relocate {store.url} SHARDS`"
                if before == now and before.startswith("tar")
                else ""
            ),
        )
    return list(gone)


def remove_step(step: Step, store: Store) -> None:
    """Take away all that a step made. Its records go last, so that they tell a removal that was cut short."""
    if not step.stage.scratch or step.name in store.manifest()["stages"]:
        invalidate(store, [step.name], step.stage.entries)
    made = {output["path"] for record in records(store, step.name).values() for output in record["outputs"]}
    for pattern in step.owns.split():
        folder, _, name = pattern.rpartition("/")
        if not name:
            store.remove_folder(folder)
            made = {path for path in made if not path.startswith(pattern)}
        elif not folder:
            made.add(name)
        elif not name.startswith("*"):
            made |= {path for path in store.sizes(folder) if pattern_of(pattern).fullmatch(path)}
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(store.remove, made))
    store.remove_folder(STATE.format(step.name))


def _source(task: Mapping[str, Any]) -> str:
    """What a task or its record says it read from outside the store, or else of it."""
    names = {name.split(" ")[0] for name in task.get("inputs", {})}
    names = names or {f"the store's own {name}s" for name in task["built"]}
    return " and ".join([*sorted(names), *(["vectors"] if "with_vectors" in task.get("settings", {}) else [])])
