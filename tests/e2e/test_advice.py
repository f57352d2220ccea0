"""Every next step that a refused command names: the command is refused, the step is done as it says, and one gets on.

CASES is the list. The last test compares it with the source: whoever writes new advice that names a verb or an option
adds a case, or says in UNREACHED why no test can follow it here.
"""

from __future__ import annotations

import ast
import io
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

no recipe
  run {nowhere} {store}
  -> `graphbuild run --help` shows a recipe
  run {recipe} {store}

a text that is no recipe
  run {blank} {store}
  -> `graphbuild run --help` shows a recipe
  run {recipe} {store}

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

a tar that is cut
  embed {store} --shards {cut}
  -> leave it out of --shards
  embed {store} --shards {tar}

names with blank lines
  embed {store} --shards {labels} --caption-member cls --class-names {blank}
  -> see --class-names in docs/reference/recipe.md
  embed {store} --shards {labels} --caption-member cls --class-names {names}

a plan of a recipe whose list is nowhere
  plan {gone}
  -> check the path of the list, or give --rows
  plan {gone} --rows 1000

a download without a URL
  download {store} {without}
  -> check --url-column and --preset
  download {store} {urls} --dry-run

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

vectors of other counts than the tars
  embed {store} --shards {tar} --vectors {npy}
  -> name the keys of the vectors by --vector-keys
  embed {store} --shards {tar} --vectors {npy} --vector-keys {keys}

vectors without lists of keys
  embed {store} --shards {tar} --vectors {npy} --key-column key
  -> name a file of keys for each file of vectors by --vector-keys
  embed {store} --shards {tar} --vectors {npy} --key-column key --vector-keys {keys}

keys of another column
  embed {store} --shards {tar} --vectors {npy} --vector-keys {keys} --key-column other
  -> name the column with the tars' keys by --key-column
  embed {store} --shards {tar} --vectors {npy} --vector-keys {keys} --key-column key

a key in two tars
  embed {store} --shards {both} --vectors {pair}/*.npy --vector-keys {pair}/*.csv
  -> join vectors and tars by their order (--vector-keys none --key-column none)
  embed {store} --shards {both} --vectors {pair}/*.npy --vector-keys none --key-column none

vectors of another array
  embed {store} --vectors {npz}
  -> name the vectors' array by --vector-column
  embed {store} --vectors {npz} --vector-column v

vectors in another member
  embed {store} --shards {held} --vector-member npy
  -> name the member that holds it by --vector-member
  embed {store} --shards {held} --vector-member emb

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
  mine {store} --what positives --threshold 0 --out {folder}
  -> name a file by --out
  mine {store} --what positives --threshold 0 --out {mined}

an option of another list [indexed]
  match {store} --captions {csv} --what novel --threshold 0.5
  -> --what novel takes --k
  match {store} --captions {csv} --what novel --k 2

captions for ready vectors [vectors]
  match {store} --captions {csv}
  -> give the queries' vectors by --vectors or --store; without --threshold, leaks compare texts alone
  match {store} --vectors {npy}

a store beside itself [indexed]
  match {store} --store {store}
  -> use `graphbuild mine --what duplicates`
  mine {store} --what duplicates --threshold 0.9

pictures of a list [indexed]
  match {store} --what leaks --images {tar}
  -> leave --bits and --images out
  match {store} --what leaks --captions {csv}

pictures that are nowhere [tars]
  match {store} --what leaks --images {empty}
  -> check --images
  match {store} --what leaks --images {tar}

texts of vectors [vectors]
  mine {store} --what hard-negatives --count 1 --format triplets
  -> leave --rescore and --format out
  mine {store} --what hard-negatives --count 1

a list of something else as matches [indexed]
  mine {store} --what hard-negatives --count 1 --matches {two}
  -> write it by `graphbuild match --what neighbors`
  match {store} --captions {csv} --what neighbors
  mine {store} --what hard-negatives --count 1 --matches {store}/match/neighbors.parquet

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

a pack without a source
  pack {store}
  -> graphbuild pack STORE SOURCE
  pack {store} {images}

two columns of images
  pack {store} {two}
  -> name the one by --image-column
  pack {store} {two} --image-column image

a column without images
  pack {store} {two} --image-column number
  -> name another with --image-column
  pack {store} {two} --image-column image

a column of no images
  pack {store} {two} --image-column other
  -> check --image-column
  pack {store} {two} --image-column image --force

columns of a list [indexed]
  export {store} --layout columns
  -> use the default layout, or `graphbuild pack` the files
  export {store}

a selection without a rule [indexed]
  select {store}
  -> give --keep, --drop, --where, --min-degree or --budget
  select {store} --where "row < 3"

a selection with a path for its name [indexed]
  select {store} here/it --min-degree 0 --where "row < 3"
  -> use letters, digits, -, _ and .; or name a file by --out
  select {store} it --where "row < 3"

a group's sample without groups [indexed]
  select {store} --where "row < 3" --prefer longest
  -> use one of first, sharpest, neighbors, longest, with --drop
  select {store} --where "row < 3"

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
# Advice that no case follows, by how it begins: why not, or the test that does.
ELSEWHERE = {
    "install torch anew": "a broken torch",
    "pip install": "another set of packages",
    "pip uninstall faiss-cpu": "a GPU",
    "use --engine exact or partition, or install it anew": "a broken faiss",
    "say --device cpu": "a GPU",
    "use --engine exact, or --device cpu": "a GPU",
    "use --engine exact, or a FAISS index": "tests/knn/test_engines.py",
    "write the tar again with the files themselves": "tests/sources/test_tars.py",
    "use a smaller --k, --device cpu": "a GPU",
    "use --device cpu, or leave --precision away": "a GPU",
    "use --device cpu, or an --address": "a cluster without GPUs: tests/runner/test_runner.py",
    "{...}, or use --workers 0": "a Ray that does not start: tests/runner/test_runner.py",
    "give --proxy http://HOST:PORT; with --proxy env": "the environment: tests/sources/test_proxy.py",
    "choose another --port": "tests/look/pages/test_explore.py",
    "name a new or an empty folder by --static": "tests/look/pages/test_map.py",
    "name a file that you may write": "another user's folder",
    "name another folder by --out": "another user's folder",
    "choose a sentence-transformers model": "tests/nodes/encoder/test_model.py",
    "give --encoder the folder": "tests/nodes/encoder/test_model.py",
    "give no --prompt": "tests/nodes/encoder/test_model.py",
    "leave --precision away": "tests/nodes/encoder/test_model.py",
    "try --precision float32": "tests/nodes/test_no_vector.py",
    "give other words to search by": "an encoder that makes no vector of some words",
    "delete this file and run `graphbuild embed": "tests/nodes/test_no_vector.py",
    "its vectors depend on the batch": "tests/nodes/test_fidelity.py",
    "use --precision float32 and --force": "tests/nodes/test_fidelity.py",
    "pass --memory": "tests/e2e/test_bounds.py",
    "the graph is kept in graph/": "tests/graph/test_index.py",
    "rebuild with `graphbuild index --force`": "damage: tests/e2e/test_mutations.py",
    "run `graphbuild index {...} --force`": "damage: tests/e2e/test_mutations.py",
    "run `graphbuild verify {...}`": "damage: tests/e2e/test_mutations.py",
    "run `graphbuild {...} {...}` again": "tests/job/test_mixed_records.py",
    "the tar changed after the export": "tests/torch/test_loader.py",
    "pass Targets.from_batch(batch) of a batch with node_count": "tests/torch/test_calibration.py",
    "run `graphbuild export --embeddings int8`": "tests/nodes/test_plural.py",
    "read the .py files in": "tests/nodes/encoder/test_find.py",
    "name one of these, or give the text itself": "tests/nodes/encoder/test_find.py",
    "give --encoder a folder that holds the model with its code": "tests/nodes/encoder/test_find.py",
    "use --k 0": "tests/nodes/test_class_names.py",
    "--graph works with": "tests/open_clip/test_launcher.py",
    "name the store by --graph": "tests/open_clip/test_launcher.py",
    "name the store of these tars by --graph": "tests/open_clip/test_launcher.py",
    "name tars by --train-data": "tests/open_clip/test_launcher.py",
    "restore it, or run `graphbuild embed`, `index` and": "tests/open_clip/test_launcher.py",
    "take a smaller --batch-size": "tests/open_clip/test_launcher.py",
    "open the graph of the sidecars' store": "tests/torch/test_dataset.py",
    "run `graphbuild export` ": "tests/torch/test_loader.py",
    "make it again with `graphbuild select`": "tests/graph/test_selection.py",
    "make it again by `graphbuild select`": "tests/graph/test_selection.py",
    "make one by `graphbuild select`": "tests/graph/test_selection.py",
    "prefer needs a list of `mine --what duplicates`": "tests/graph/test_selection.py",
    "write the tar again without --sparse": "tests/sources/test_tars.py",
    "ask by KEY, or by node": "tests/look/pages/test_without_encoder.py",
    "write it again by `graphbuild match`": "tests/graph/test_negatives.py",
    "see --class-names": "a label of other tars than the names': tests/nodes/test_matrix.py",
    "--preset takes": "the library alone: the command line has the choices",
    "set --k to 1 or more": "the library alone: a recipe refuses it before",
    "correct it; what is allowed": "tests/e2e/test_next_steps.py",
    "add --with-self": "tests/e2e/test_foreign_graphs.py",
    "let its engine search more": "tests/e2e/test_foreign_graphs.py",
    "give a list for each vector": "tests/e2e/test_foreign_graphs.py",
    "name the lists' one by --neighbor-column": "tests/e2e/test_foreign_graphs.py",
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
    pixel = b"P6 1 1 255 abc"
    pq.write_table(pa.table({"image": [pixel, pixel]}), folder / "images.parquet")
    two = {"image": [pixel, pixel], "other": [b"a", b"b"], "number": [1, 2]}
    pq.write_table(pa.table(two), folder / "two.parquet")
    np.savez(folder / "v.npz", v=rng.normal(size=(6, 8)), others=np.arange(6))
    write_list(folder / "keys.csv", "key,other\n" + "".join(f"{n:06d},other {n}\n" for n in range(6)))
    held = [(f"{n:04d}.{end}", content) for n, text in enumerate(CAPTIONS) for end, content in member(n, text).items()]
    write_tar(folder / "held.tar", held)
    (folder / "pair").mkdir()
    for name in "ab":
        np.save(folder / f"pair/{name}.npy", rng.normal(size=(len(CAPTIONS), 8)))
        write_tar(folder / f"pair/{name}.tar", captioned(CAPTIONS))
    write_list(folder / "pair/a.csv", "key\n" + "".join(f"{n:06d}\n" for n in range(5)))
    write_list(folder / "pair/b.csv", "key\n" + "".join(f"{n:06d} b\n" for n in range(5)))
    write_list(folder / "blank.txt", "a dog\n\na cow\n")
    write_list(folder / "without.csv", "url,caption\n,a dog\n,a cat\n")
    write_list(folder / "gone.yaml", f"download: {{urls: {folder}/nowhere.csv}}\n")
    (folder / "empty").mkdir()
    (folder / "folder.parquet").mkdir()
    write_list(folder / "job.yaml", f"embed: {{captions: {folder}/list.csv}}\n")
    write_tar(folder / "a.tar", captioned(CAPTIONS))
    (folder / "cut.tar").write_bytes((folder / "a.tar").read_bytes()[:3_000])
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
        "shrunk": "shrunk.npy",
        "cut": "cut.tar",
        "blank": "blank.txt",
        "nowhere": "nowhere.csv",
        "without": "without.csv",
        "gone": "gone.yaml",
        "folder": "folder.parquet",
        "images": "images.parquet",
        "two": "two.parquet",
    }
    named |= {"keys": "keys.csv", "npz": "v.npz", "held": "held.tar", "pair": "pair", "both": "pair/*.tar"}
    return {name: folder / path for name, path in named.items()}


def member(number: int, text: str) -> dict[str, bytes]:
    """A sample's members: its caption, and a vector."""
    vector = io.BytesIO()
    np.save(vector, np.random.default_rng(number).normal(size=8))
    return {"txt": text.encode(), "emb": vector.getvalue()}


def run(words: str, paths: dict[str, Path]) -> Any:
    verb, *rest = (word.format(**paths) for word in shlex.split(words))
    without = verb in ("verify", "report", "neighbors", "mine", "match", "plan", "select") or "--dry-run" in rest
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


def _filled_in(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    inner = part.value if isinstance(part, ast.FormattedValue) else part
    return errors.install_extra("{...}") if "install_extra" in ast.unparse(inner) else "{...}"


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(map(_filled_in, node.values))]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    return []


def test_every_advice_that_names_a_verb_or_an_option_is_followed_here_or_says_why_not() -> None:
    if len(said) < len(CASES):
        pytest.skip("some cases were not run")
    heard = {" ".join(one.split()) for one in said}
    left = []
    for text in advised():
        pattern = ".*?".join(re.escape(" ".join(part.split())) for part in text.split("{...}"))
        if not text.startswith(tuple(ELSEWHERE)) and not any(re.search(pattern, one) for one in heard):
            left.append(text)
    assert left == []
    tests = {path for why in ELSEWHERE.values() for path in re.findall(r"tests/\S+\.py", why)}
    assert not [path for path in tests if not (Path(__file__).parents[2] / path).exists()]
