"""What of a job is done: which tasks still run, what has changed, and what later stages may build on.

Reads and writes `_state/`, the stages of manifest.json and recipe.yaml; the commit protocol: docs/reference/format.md.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from graphbuild.errors import ConfigError, public
from graphbuild.recipe import Recipe, flag, marked
from graphbuild.runner.stage import Stage, Task, digest, named_file, records, state_path, titled, write_manifest
from graphbuild.store.layout import RECIPE, by_number
from graphbuild.store.remote import READERS
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)


def pending(
    stage: Stage,
    tasks: Sequence[Task],
    done: Mapping[str, Json],
    store: Store,
    *,
    force: bool,
    remove: bool = True,
    unread: Sequence[str] = (),
) -> list[Task]:
    """The tasks still to do. Raises ConfigError with a diff where the user changed what finished work was built from.

    Work whose input an earlier stage has built anew is simply done again. remove: take its files away at once. unread:
    folders of scratch that nobody reads any more, whose files need not be there unless there is something to do.
    """
    other = {
        t.name: t.changes(done[t.name])
        for t in tasks
        if t.name in done and done[t.name]["fingerprint"] != t.fingerprint
    }
    gone = sorted(done.keys() - {task.name for task in tasks})
    gone_inputs = [name for name in gone if done[name]["inputs"]]
    changed = [name for name, lines in other.items() if lines]
    if (changed or gone_inputs) and not force:
        lines = sorted({line for name in changed for line in other[name]})
        now = {named_file(new): new for task in tasks for new in task.inputs.values()}
        before = {
            named_file(old): (kind, old)
            for name in gone_inputs
            for kind, old in done[name]["inputs"].items()
            if now.get(named_file(old), old) != old
        }
        lines += [f"{kind}: {old} -> {now[file]}" for file, (kind, old) in before.items()]
        absent = [
            name for name in gone_inputs if not any(named_file(old) in before for old in done[name]["inputs"].values())
        ]
        if absent:
            named = ", ".join(titled(name, done[name]["inputs"]) for name in absent[:5])
            lines.append(f"no longer in the input: {named}{' ...' if len(absent) > 5 else ''}")
        keeps = any(stage.keeps(done[name]) for name in gone_inputs)
        raise ConfigError(
            f"{store.url} was built differently "
            f"({stage.name}: {len(changed) + len(gone_inputs)} of {len(done)} finished tasks):"
            + "".join(f"\n    {line}" for line in lines[:20]),
            "give the same settings and inputs again, use another STORE, or add --force to rebuild what differs"
            + (", where the rows of files that are gone or changed keep their numbers, without a node" if keeps else "")
            + (
                "; tars that were only moved: `graphbuild relocate`"
                if any("tar" in done[n]["inputs"] for n in gone)
                else ""
            ),
        )

    def take_away(name: str) -> None:
        if name in gone and stage.keeps(done[name]):
            store.write_json(state_path(stage.name, name, "gone"), done[name])
        else:
            for output in done[name]["outputs"]:
                store.remove(output["path"])
        store.remove(state_path(stage.name, name))

    if remove:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(take_away, [*other, *gone]))
    kept = {name: record["outputs"] for name, record in done.items() if name not in other and name not in gone}
    sizes: dict[str, int] = {}
    for folder in {output["path"].rsplit("/", 1)[0] for outputs in kept.values() for output in outputs}:
        sizes.update(store.sizes(folder))
    lost = {name: [o["path"] for o in outputs if sizes.get(o["path"]) != o["bytes"]] for name, outputs in kept.items()}
    if all(all(path.startswith(tuple(unread)) for path in lost.get(task.name, [""])) for task in tasks):
        return []
    todo = [task for task in tasks if lost.get(task.name, [""])]
    for task in todo if remove else ():
        if task.name in kept:
            path = lost[task.name][0]
            logger.warning("%s is missing or of another size; running %s %s again", path, stage.name, task.title)
    return todo


def is_done(stage: Stage, recipe: Recipe, store: Store, *, force: bool, unread: Sequence[str] = ()) -> bool:
    """Whether nothing of a stage is left to do; unread, and what it raises: as of `pending`."""
    tasks, done = stage.plan(recipe, store), records(store, stage.name)
    return len(tasks) == len(done) and not pending(stage, tasks, done, store, force=force, remove=False, unread=unread)


def write_recipe(recipe: Recipe, store: Store) -> None:
    """The resolved recipe, beside what it made; written once its changes are accepted."""
    text = sealed_text(recipe.dump().encode())
    if store.exists(RECIPE) and store.read_bytes(RECIPE) == text:
        return
    manifest = store.manifest()
    if manifest.pop("recipe", None) is not None:  # its sha256, until the command has ended
        write_manifest(store, manifest)
    store.write_bytes(RECIPE, text)
    for section, name in marked("path"):
        url = getattr(getattr(recipe, section), name) or ""
        if public(url) != url:
            logger.warning("%s is kept without its query: give it again with each command that reads it", flag(name))


def sealed_text(text: bytes) -> bytes:
    """Lines with one more, a comment: their sha256."""
    return text + f"# sha256 of the lines above: {hashlib.sha256(text).hexdigest()}\n".encode()


def invalidate(store: Store, stages: Sequence[str], keys: Sequence[str] = ()) -> None:
    """Take stages out of the manifest, so that nothing builds on what they made, and top-level keys of theirs."""
    manifest = store.manifest()
    stale = [manifest["stages"].pop(name, None) for name in stages] + [manifest.pop(key, None) for key in keys]
    if any(entry is not None for entry in stale):
        write_manifest(store, manifest)


def are_finished(entry: Json, done: Mapping[str, Json]) -> bool:
    """Whether these records, by task, are those from which a finished stage's entry in the manifest was made."""
    orders = (sorted(done), sorted(done, key=by_number))
    told = (digest([[name, done[name]["fingerprint"]] for name in order]) for order in orders)
    return len(done) == entry["tasks"] and entry["fingerprint"] in told


def require(store: Store, stage: str, verb: str) -> list[Json]:
    """The records of a finished stage that the next one builds on; ConfigError names the verb to run first."""
    if stage not in store.manifest()["stages"]:
        raise ConfigError(
            f"{store.url}: `graphbuild {verb}` is not finished", f"run `graphbuild {verb} {store.url}` first"
        )
    return list(records(store, stage).values())
