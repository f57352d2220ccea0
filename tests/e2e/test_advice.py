"""Every next step that a refused command names: the command is refused, the step is done as it says, and one gets on.

CASES is the list. The last test compares it with the source: whoever writes new advice that names a verb or an option
adds a case, or says in UNREACHED why no test can follow it here.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import graphbuild as package
from graphbuild import errors
from tests.e2e.test_bad_input import captioned, graphbuild, refused, succeeded, write_list, write_tar

CAPTIONS = ["a dog", "a cat", "a red car", "two birds", "an old house by the sea"]
said: list[str] = []  # on stderr, by the refused commands of this module


@dataclass(frozen=True)
class Case:
    """wrong: a command that is refused. advice: what it says one can do; right: just that, command after command.
    of: the store that {store} is a copy of; "": an empty one."""

    of: str
    wrong: str
    advice: str
    right: tuple[str, ...]


# Name [of]; wrong; -> advice; right. The words are a shell's, {name} a path of `materials`.
TABLE = r"""
index of nothing
  index {store} --k 2
  -> run `graphbuild embed {store}` first
  embed {store} --captions {csv}
  index {store} --k 2

export without a graph [embedded]
  export {store}
  -> run `graphbuild index {store}` first
  index {store} --k 2
  export {store}

neighbours without a graph [embedded]
  neighbors {store} 1
  -> run `graphbuild index {store}` first
  index {store} --k 2
  neighbors {store} 1

no source
  embed {store}
  -> name the source by --shards, --captions or --vectors
  embed {store} --captions {csv}

too many neighbours [embedded]
  index {store} --k 9
  -> use --k 4 or fewer
  index {store} --k 4

another setting [embedded]
  embed {store} --captions {csv} --caption-column other
  -> add --force to rebuild what differs
  embed {store} --captions {csv} --caption-column other --force

another source [indexed]
  embed {store} --vectors {npy}
  -> add --force to replace
  embed {store} --vectors {npy} --force

another engine [indexed]
  index {store} --k 2 --engine partition
  -> add --force
  index {store} --k 2 --engine partition --force

a column of another name
  embed {store} --captions {named}
  -> name one with --caption-column
  embed {store} --captions {named} --caption-column words

a column twice
  embed {store} --captions {twice}
  -> rename them, or name another with --caption-column
  embed {store} --captions {twice} --caption-column other

a preset for a table with a head
  embed {store} --captions {csv} --preset cc3m
  -> drop --preset and name the columns
  embed {store} --captions {csv}

a TSV of two presets
  embed {store} --captions {tsv} --preset cc12m
  -> use --preset cc3m
  embed {store} --captions {tsv} --preset cc3m

no caption in a list
  embed {store} --captions {csv} --caption-column blank
  -> check --caption-column
  embed {store} --captions {csv} --caption-column other

captions in another member
  embed {store} --shards {labels}
  -> name the member that holds it by --caption-member
  embed {store} --shards {labels} --caption-member cls

a folder without tars
  embed {store} --shards {empty}
  -> check --shards
  embed {store} --shards {tar}

vectors of another column
  embed {store} --vectors {parquet}
  -> name the vectors' column by --vector-column
  embed {store} --vectors {parquet} --vector-column v

vectors in a text
  embed {store} --vectors {csv}
  -> give --vectors a .npy or parquet file
  embed {store} --vectors {npy}

too many dimensions
  embed {store} --captions {csv} --dim 999
  -> give a smaller --dim
  embed {store} --captions {csv} --dim 64

an encoder that is nowhere
  embed {store} --captions {csv} --encoder no/such
  -> check --encoder
  embed {store} --captions {csv} --encoder none

an encoder that is an empty folder
  embed {store} --captions {csv} --encoder {empty}
  -> with --encoder
  embed {store} --captions {csv}

a matrix without names
  embed {store} --shards {labels} --caption-member cls --encoder matrix:{square}
  -> name its rows, one a line, with --class-names
  embed {store} --shards {labels} --caption-member cls --encoder matrix:{square} --class-names {names}

a matrix that is none
  embed {store} --shards {labels} --caption-member cls --encoder matrix:{indefinite} --class-names {names}
  -> shrink it towards the identity, as in 0.5 * S + 0.5 * I
  embed {store} --shards {labels} --caption-member cls --encoder matrix:{shrunk} --class-names {names}

a device that is not here [embedded]
  index {store} --k 2 --device cuda
  -> use --device cpu
  index {store} --k 2 --device cpu

a factory that faiss does not know [embedded]
  index {store} --k 2 --engine faiss:Nonsense
  -> --engine
  index {store} --k 2 --engine exact

more lists than nodes [embedded]
  index {store} --k 2 --engine faiss:IVF4096,Flat
  -> or --engine partition
  index {store} --k 2 --engine partition

tars of a store without [indexed]
  export {store} --layout clustered
  -> use the default layout
  export {store}

sketches inside [tars]
  export {store} --layout inline --embeddings sketch:64
  -> use --embeddings int8, float16 or none
  export {store} --layout inline --embeddings int8

more negatives than the graph has [indexed]
  mine {store} --what hard-negatives --skip 1 --count 9 --out {mined}
  -> index with a larger --k
  index {store} --k 4 --force
  mine {store} --what hard-negatives --skip 1 --count 3 --out {mined}

a list over a folder [indexed]
  mine {store} --what positives --out {empty}
  -> name a file
  mine {store} --what positives --out {mined}

a key of vectors [vectors]
  neighbors {store} 3
  -> ask by node (--node)
  neighbors {store} --node 3

a text of vectors [vectors]
  neighbors {store} --text dog
  -> --node
  neighbors {store} --node 3

a text of blanks [indexed]
  neighbors {store} --text ' '
  -> give some words to search by (--text)
  neighbors {store} --text dog

an empty store to verify
  verify {store}
  -> run a stage first, for instance `graphbuild embed`
  embed {store} --captions {csv}
  verify {store}

an empty store to report
  report {store}
  -> run a stage first, for instance `graphbuild embed`
  embed {store} --captions {csv}
  report {store}

a list to relocate [indexed]
  relocate {store} {tar}
  -> of `embed --shards`
  embed {other} --shards {tar}
  relocate {other} {tar}

moved tars [tars]
  embed {store} --shards {moved}
  -> graphbuild relocate {store} SHARDS
  relocate {store} {moved}
  export {store}
  verify {store}

a download without a list
  download {store}
  -> graphbuild download STORE URLS
  download {store} {urls} --dry-run

a plan of a list that is nowhere
  download {store} {mined} --dry-run
  -> check the path
  download {store} {urls} --dry-run

a node that is none
  plan {recipe} --on nodes=x
  -> as in --on nodes=32,cores=64
  plan {recipe} --on nodes=32,cores=64,memory=256
"""


def cases() -> dict[str, Case]:
    found = {}
    for block in TABLE.replace("\\\n", " ").strip().split("\n\n"):
        head, wrong, advice, *right = (line.strip() for line in block.splitlines())
        name, _, of = head.removesuffix("]").partition(" [")
        found[name] = Case(of, wrong, advice.removeprefix("-> "), tuple(right))
    return found


CASES = cases()
# Advice that names a verb or an option, and why no test here can follow it.
UNREACHED = {
    "install": "another set of packages",
    "GPU": "a GPU",
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores by what they are; a case works on a copy."""
    folder = tmp_path_factory.mktemp("stores")
    lists = materials(folder)
    for name, source in (
        ("embedded", "--captions {csv}"),
        ("indexed", "--captions {csv}"),
        ("vectors", "--vectors {npy}"),
    ):
        succeeded(run(f"embed {{store}} {source}", {**lists, "store": folder / name}))
    succeeded(run("embed {store} --shards {tar}", {**lists, "store": folder / "tars"}))
    for name in ("indexed", "vectors", "tars"):
        succeeded(run("index {store} --k 2", {**lists, "store": folder / name}))
    return {"": folder / "nothing", **{name: folder / name for name in ("embedded", "indexed", "vectors", "tars")}}


def materials(folder: Path) -> dict[str, Path]:
    """Inputs by name, in a folder."""
    rng = np.random.default_rng(0)
    rows = [f"{caption},{caption} again," for caption in CAPTIONS]
    write_list(folder / "list.csv", "\n".join(["caption,other,blank", *rows]) + "\n")
    write_list(folder / "named.csv", "\n".join(["words", *CAPTIONS]) + "\n")
    write_list(
        folder / "twice.csv", "caption,caption,other\n" + "\n".join(f"a,b,{caption}" for caption in CAPTIONS) + "\n"
    )
    write_list(folder / "list.tsv", "".join(f"{caption}\thttp://a.example/{n}\n" for n, caption in enumerate(CAPTIONS)))
    write_list(
        folder / "urls.csv", "url,caption\n" + "".join(f"http://a.example/{n},{c}\n" for n, c in enumerate(CAPTIONS))
    )
    write_list(folder / "names.txt", "a dog\na cat\na cow\n")
    np.save(folder / "v.npy", rng.normal(size=(6, 8)).astype(np.float32))
    np.save(folder / "square.npy", np.eye(3))
    indefinite = np.array([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])
    np.save(folder / "indefinite.npy", indefinite)
    np.save(folder / "shrunk.npy", 0.5 * indefinite + 0.5 * np.eye(3))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=48)), 8)
    pq.write_table(pa.table({"v": vectors}), folder / "v.parquet")
    (folder / "empty").mkdir()
    write_list(folder / "job.yaml", f"embed: {{captions: {folder}/list.csv}}\n")
    write_tar(folder / "a.tar", captioned(CAPTIONS))
    write_tar(folder / "labels.tar", [(f"{n}.cls", str(n % 3).encode()) for n in range(6)])
    named = {
        "csv": "list.csv",
        "tsv": "list.tsv",
        "names": "names.txt",
        "npy": "v.npy",
        "parquet": "v.parquet",
        "tar": "a.tar",
    }
    named |= {
        "labels": "labels.tar",
        "named": "named.csv",
        "twice": "twice.csv",
        "urls": "urls.csv",
        "mined": "mined.parquet",
    }
    named |= {
        "moved": "moved",
        "recipe": "job.yaml",
        "other": "other",
        "empty": "empty",
        "square": "square.npy",
        "indefinite": "indefinite.npy",
    }
    return {name: folder / path for name, path in named.items()}


def run(words: str, paths: dict[str, Path]) -> Any:
    verb, *rest = (word.format(**paths) for word in shlex.split(words))
    without = verb in ("verify", "report", "neighbors", "mine", "plan") or "--dry-run" in rest
    return graphbuild(verb, *rest, *(() if without else ("--workers", 0)))


@pytest.mark.parametrize("name", CASES)
def test_who_does_what_a_refused_command_says_gets_on(name: str, tmp_path: Path, stores: dict[str, Path]) -> None:
    tried = CASES[name]
    paths = {**materials(tmp_path), "store": tmp_path / "store"}
    if tried.of:
        shutil.copytree(stores[tried.of], paths["store"])
    if name == "moved tars":
        paths["moved"].mkdir()
        shutil.copy(stores["tars"].parent / "a.tar", paths["moved"] / "b.tar")
    outcome = run(tried.wrong, paths)
    refused(outcome, tried.advice.format(**paths))
    said.append(outcome.err)
    for words in tried.right:
        succeeded(run(words, paths))


def advised() -> set[str]:
    """What errors in the source say to do, where it names a verb or an option; {...} stands for what is filled in."""
    kinds = {name for name in vars(errors) if name.endswith("Error")} | {"SampleIndexError"}
    found = set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in kinds
                and len(node.args) > 1
            ):
                found |= {text for text in _texts(node.args[1]) if re.search(r"`graphbuild |--[a-z]", text)}
    return found


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "{...}" for part in node.values)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    return []


def test_every_advice_that_names_a_verb_or_an_option_is_followed_here_or_says_why_not() -> None:
    heard = " ".join(" ".join(said).split())
    for text in sorted(advised()):
        pattern = ".*?".join(re.escape(" ".join(part.split())) for part in text.split("{...}"))
        print("HEARD " if re.search(pattern, heard) else "UNHEARD ", text)
