"""The job on one page: every step in order, what it reads, which files it alone writes, and the verb that runs it.

From this table follow the order of the steps, what a changed step makes stale, which files one step must take away
before another may write them, when scratch goes, and what `verify` and `report` look for. A new stage is a module with
its `Stage`, and a line here.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from graphbuild.errors import ConfigError, StageError
from graphbuild.export import cells, clustered, columns, inline, sidecars
from graphbuild.graph import certify, codes, grow, index, moments, order, prepare
from graphbuild.graph.lists import derived
from graphbuild.machine.versions import version_of
from graphbuild.nodes import distinct, encode, fidelity, number, scan, vectors
from graphbuild.recipe import Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, records, state_path, write_manifest
from graphbuild.runner.state import are_finished, invalidate, is_done, write_recipe
from graphbuild.sources import download, pack
from graphbuild.store.layout import STATE
from graphbuild.store.leftovers import remove_leftovers
from graphbuild.store.remote import READERS
from graphbuild.store.store import Json, Store


@dataclass(frozen=True)
class Step:
    """A stage's place in the job.

    verb: the command that runs it. reads: files of other steps, and, as words, what comes from outside the store. owns:
    the files that this step alone writes, beside its records in `_state/<stage>/`. In both, `#` is a shard's number,
    `*` any name (also of a user's own file: only what a record names is removed), and a folder with its `/` all that
    lies in it. Steps that own the same files exclude each other.
    """

    stage: Stage
    verb: str
    reads: str
    owns: str

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def reads_outside(self) -> bool:
        return any("/" not in word for word in self.reads.split(" | "))

    def finished(self, store: Store) -> dict[str, int]:
        """Path -> bytes of the records of its finished tasks."""
        return {
            path: size for path, size in store.sizes(STATE.format(self.name)).items() if path.endswith(".done.json")
        }


# fmt: off
STEPS = (
    #    stage              verb        reads                            owns
    Step(download.COUNT,    "download", "",                              ""),  # of the list, which is urls' source
    Step(download.URLS,     "download", "list | _state/count/",          "_state/urls/#.parquet"
                                                                         " rejected/urls/#.parquet"),
    Step(download.DOWNLOAD, "download", "_state/urls/",                  "shards/#.tar shards/#.parquet"
                                                                         " shards/#_stats.json"),
    Step(pack.STAGE,        "pack",     "images",                        "shards/#.tar rejected/pack/#.parquet"),
    Step(scan.STAGE,        "embed",    "tars | list | shards/#.tar",    "_state/scan/#.parquet"
                                                                         " rejected/scan/#.parquet"),
    Step(distinct.SPLITTING, "embed",   "_state/scan/",                  "_work_number/split/"),
    Step(distinct.UNIQUES,  "embed",    "_work_number/split/",           "_work_number/unique/"),
    Step(distinct.MARKING,  "embed",    "_work_number/split/ _work_number/unique/", "_work_number/mark/"),
    Step(number.NUMBER,     "embed",    "_state/scan/ _work_number/mark/",
                                                                         "_state/number/ rejected/number/#.parquet"),
    Step(number.NEW_TEXTS,  "embed",    "_state/scan/ _state/number/",   ""),
    Step(encode.STAGE,      "embed",    "_state/scan/ _state/texts/",    "nodes/#.npy"),
    Step(number.ASSIGN,     "embed",    "_state/scan/ _state/encode/",   "samples/#.parquet nodes/#.parquet"
                                                                         " rejected/assign/#.parquet shards.parquet"),
    Step(fidelity.STAGE,    "embed",    "nodes/",                        ""),
    Step(vectors.STAGE,     "embed",    "vectors",                       "samples/#.parquet nodes/#.parquet"
                                                                         " nodes/#.npy shards.parquet"),
    Step(grow.STAGE,        "index",    "nodes/#.npy",                   "_work/base/"),
    Step(prepare.STAGE,     "index",    "nodes/#.npy",                   "_work/leaders/ _work/*"),
    Step(codes.STAGE,       "index",    "nodes/ _work/leaders/",         "_work/codes/ _work/scales/ _work/floors/"
                                                                         " _work/gone/ _work/moments/ _work/sorted/"),
    Step(moments.STAGE,     "index",    "_work/moments/",                "_state/moments/ graph/basis.npy"),
    Step(order.STAGE,       "index",    "_state/codes/ _work/sorted/",      "_work/ordered/"),
    Step(index.JOIN,        "index",    "_work/codes/ _work/scales/ _work/floors/ _work/leaders/ _work/ordered/",
                                                                         "_work/join/"),
    Step(index.MERGE,       "index",    "_work/join/ _work/base/",       "_work/merged/"),
    Step(index.REFINE,      "index",    "_work/merged/ _work/ordered/ _work/leaders/ _work/*", "_work/refined/"),
    Step(index.SEARCH,      "index",    "nodes/ _state/moments/ graph/basis.npy _work/* _work/leaders/ _work/codes/"
                                        " _work/scales/ _work/floors/ _work/gone/ _work/ordered/ _work/merged/"
                                        " _work/refined/",               "graph/#.*.npy"),
    Step(certify.STAGE,     "index",    "nodes/#.npy graph/#.*.npy",     "_state/certify/#.*.npy"),
    Step(sidecars.STAGE,    "export",   "_state/certify/ samples/",      "shards/*.graph.parquet shards/sizes.json"),
    Step(inline.STAGE,      "export",   "_state/certify/ samples/",      "inline/"),
    Step(columns.STAGE,     "export",   "_state/certify/ samples/",      "columns/"),
    Step(cells.CELLS,       "export",   "_state/certify/ samples/",      "_work_clustered/cells/"),
    Step(cells.ARRANGE,     "export",   "_work_clustered/cells/",        "_work_clustered/places/"),
    Step(clustered.SCATTER, "export",   "_work_clustered/places/",       "_work_clustered/#.rows"
                                                                         " _work_clustered/#.moved"),
    Step(clustered.CLUSTER, "export",   "_work_clustered/#.rows",        "clustered/"),
    Step(derived.MINE,        "mine",     "_state/certify/ samples/",      "mined/*.parquet"),
    Step(derived.SELECT,      "select",   "_state/certify/ samples/",      "selections/*.parquet"),
    Step(derived.MATCH,       "match",    "_state/certify/ samples/",      "match/*.parquet"
                                                                         " rejected/match/*.parquet"),
)
# fmt: on
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


# -- what follows from the table


@cache
def readers(step: Step) -> tuple[Step, ...]:
    """The steps that build on one, directly or through others, in their order."""
    found = {other.name for reader in _direct_readers(step) for other in (reader, *readers(reader))}
    return tuple(other for other in STEPS if other.name in found)


def served(step: Step) -> list[Step]:
    """The steps whose files outlive the verb, for which a step's scratch is there."""
    near = _direct_readers(step)
    found = {other.name for reader in near for other in (served(reader) if reader.stage.scratch else [reader])}
    return [other for other in STEPS if other.name in found]


@cache
def _direct_readers(step: Step) -> list[Step]:
    return _readers_of(f"{step.owns} {STATE.format(step.name)}/", step)


@cache
def _readers_of(files: str, step: Step) -> list[Step]:
    """The steps that read some of these files of a step."""
    return [other for other in STEPS if other is not step and _meet(other.reads, files)]


@cache
def folders(step: Step) -> dict[str, Step]:
    """The folders of a step's scratch, and for each the last step that reads it, after which it goes."""
    owned = [pattern for pattern in step.owns.split() if step.stage.scratch and pattern.endswith("/")]
    return {folder: _readers_of(folder, step)[-1] for folder in owned}


def step_of(stage: Stage) -> Step:
    return next(step for step in STEPS if step.name == stage.name)


def _meet(some: str, others: str) -> bool:
    """Whether two lists of patterns can mean one file."""
    pairs = [(one, other) for one in some.split() for other in others.split() if "/" in one and "/" in other]
    return any(_pattern(a).fullmatch(_example(b)) or _pattern(b).fullmatch(_example(a)) for a, b in pairs)


@cache
def _pattern(text: str) -> re.Pattern[str]:
    signs = {"#": r"\d+", "*": "[^/]+"}
    return re.compile("".join(signs.get(sign, re.escape(sign)) for sign in text) + (".*" if text.endswith("/") else ""))


def _example(text: str) -> str:
    return text.replace("#", "00000").replace("*", "a")


# -- running a verb


def steps_of(verb: str, recipe: Recipe) -> list[Step]:
    """The steps of download, pack, embed, index, export, or of `run`, which is all that the recipe's source needs."""
    if verb == "run":
        given = {"download.urls": recipe.download.urls, "pack.source": recipe.pack.source}
        given[f"embed.{recipe.embed.source}"] = recipe.embed.source or None
        sources = [name for name, value in given.items() if value is not None]
        if len(sources) > 1:
            raise ConfigError(
                f"the recipe has {' and '.join(sources)}: {len(sources)} sources", "name only one in the recipe"
            )
        first = [name.partition(".")[0] for name in sources if not name.startswith("embed")]
        return [step for part in (*first, "embed", "index", "export") for step in steps_of(part, recipe)]
    layouts = {"sidecars": [sidecars.STAGE], "inline": [inline.STAGE], "clustered": clustered.STAGES}
    layout = {**layouts, "columns": [columns.STAGE]}[recipe.export.layout]
    steps = [step for step in STEPS if step.verb == verb]
    if verb == "embed":
        return [step for step in steps if (step.stage is vectors.STAGE) == (recipe.embed.source == "vectors")]
    return [step for step in steps if verb != "export" or step.stage in layout]


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
    """The folders of a step's scratch whose readers are all done, so that they may be gone."""

    def is_over(reader: Step) -> bool:
        if reader.name not in store.manifest()["stages"]:
            return False
        unread = _unread(reader, recipe, store, force=force)
        return is_done(reader.stage, recipe, store, force=force, unread=unread)

    return [folder for folder in folders(step) if all(map(is_over, _readers_of(folder, step)))]


def replaced_by(step: Step, tasks: Sequence[Task], store: Store, *, force: bool) -> list[Step]:
    """The steps whose work must go before these tasks of a step may run: where finished work was made of another
    source, all steps of its verb and of later ones, and of a verb that makes the same files. Another source is one of
    another kind, or one of the same kind with none of its files. Records of a step that excludes this one decide: what
    both wrote may be of either. Nothing is removed here.

    Raises:
        ConfigError: there is such work, and force is not given.
    """
    files = " ".join(other.owns for other in STEPS if other.verb == step.verb)
    verbs = {other.verb for other in STEPS if other.verb == step.verb or _meet(other.owns, files)}
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
            made |= {path for path in store.sizes(folder) if _pattern(pattern).fullmatch(path)}
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(store.remove, made))
    store.remove_folder(STATE.format(step.name))


def _source(task: Mapping[str, Any]) -> str:
    """What a task or its record says it read from outside the store, or else of it."""
    names = {name.split(" ")[0] for name in task.get("inputs", {})}
    names = names or {f"the store's own {name}s" for name in task["built"]}
    return " and ".join([*sorted(names), *(["vectors"] if "with_vectors" in task.get("settings", {}) else [])])
