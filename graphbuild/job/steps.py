"""The job on one page: every step in order, what it reads, which files it alone writes, and the verb that runs it.

From this table follow the order of the steps, what a changed step makes stale, which files one step must take away
before another may write them, when scratch goes, and what `verify` and `report` look for. A new stage is a module with
its `Stage`, and a line here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from graphbuild.errors import ConfigError
from graphbuild.export import cells, clustered, columns, inline, sidecars
from graphbuild.graph import certify, codes, grow, index, moments, order, prepare
from graphbuild.graph.lists import derived
from graphbuild.nodes import distinct, encode, fidelity, number, scan, vectors
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage
from graphbuild.sources import download, pack
from graphbuild.store.layout import STATE
from graphbuild.store.store import Store


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
    return readers_of(f"{step.owns} {STATE.format(step.name)}/", step)


@cache
def readers_of(files: str, step: Step) -> list[Step]:
    """The steps that read some of these files of a step."""
    return [other for other in STEPS if other is not step and meet(other.reads, files)]


@cache
def folders(step: Step) -> dict[str, Step]:
    """The folders of a step's scratch, and for each the last step that reads it, after which it goes."""
    owned = [pattern for pattern in step.owns.split() if step.stage.scratch and pattern.endswith("/")]
    return {folder: readers_of(folder, step)[-1] for folder in owned}


def step_of(stage: Stage) -> Step:
    return next(step for step in STEPS if step.name == stage.name)


def meet(some: str, others: str) -> bool:
    """Whether two lists of patterns can mean one file."""
    pairs = [(one, other) for one in some.split() for other in others.split() if "/" in one and "/" in other]
    return any(pattern_of(a).fullmatch(_example(b)) or pattern_of(b).fullmatch(_example(a)) for a, b in pairs)


@cache
def pattern_of(text: str) -> re.Pattern[str]:
    signs = {"#": r"\d+", "*": "[^/]+"}
    return re.compile("".join(signs.get(sign, re.escape(sign)) for sign in text) + (".*" if text.endswith("/") else ""))


def _example(text: str) -> str:
    return text.replace("#", "00000").replace("*", "a")


# -- the steps of a verb


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
