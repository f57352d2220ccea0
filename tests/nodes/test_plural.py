"""Samples of several captions, from tars and lists to batches; references are the inputs, pyarrow and the encoder."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError, ShardError, StageError
from graphbuild.graph.lists.duplicates import near_duplicates
from graphbuild.job.verbs import run_verb
from graphbuild.look.catalog import Catalog
from graphbuild.look.verify import verify_store
from graphbuild.mine import hard_negatives
from graphbuild.nodes.captions import MAX_CAPTIONS
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import GraphDataset, graph_webdataset, similarity_targets
from tests.conftest import MakeOnce
from tests.nodes.test_no_vector import EMOJI

K = 4
WORDS = ["red hen", "blue bird", "green tree", "old house", "new car", "small dog", "grey cat", "tall man"]


def jpeg(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 7, 9)).save(content, "JPEG")
    return content.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, members in enumerate(samples, first):
            for extension, content in {"jpg": jpeg(number), **members}.items():
                info = tarfile.TarInfo(f"{number:03}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def sample(txt: str | None, **fields: Any) -> dict[str, bytes]:
    members = {} if txt is None else {"txt": txt.encode()}
    return members | ({"json": json.dumps(fields).encode()} if fields else {})


def build(store: Path, letters: str, verbs: str = "embed index export", **changes: Any) -> Path:
    """Run verbs, each with those of the changes that are its own."""
    opened = Store(str(store))
    own = {"index": {"k": K, "engine": "exact"}, "export": {"embeddings": changes.pop("embeddings", "float16")}}
    own["export"]["layout"] = changes.pop("layout", "sidecars")
    with Runner(workers=0) as runner:
        for verb in verbs.split():
            given = own.get(verb, {"encoder": letters, "precision": "float32", **changes})
            run_verb(verb, resolve(opened, verb, given), opened, runner)
    return store


def many(count: int) -> list[dict[str, bytes]]:
    """Samples of one, two or three captions, drawn from few words so that texts come again."""
    rng = random.Random(0)
    texts = lambda: " ".join(rng.sample(WORDS, 2))  # noqa: E731
    return [sample(texts(), captions=[texts() for _ in range(number % 3)] or ["-"]) for number in range(count)]


def captions_of(members: dict[str, bytes]) -> list[str]:
    more = [text for text in json.loads(members["json"])["captions"] if text != "-"]
    return [members["txt"].decode(), *more]


@pytest.fixture(scope="session")
def big(make_once: MakeOnce, letters: str) -> Path:
    """A store of three tars with 40 samples each; "-" has no vector."""

    def fill_store(folder: Path) -> None:
        for tar, members in enumerate(np.array_split(np.array(many(120)), 3)):
            write_tar(folder / "tars" / f"{tar}.tar", list(members), 40 * tar)
        build(folder / "store", letters, shards=str(folder / "tars"), caption_member="txt;json:captions")

    return make_once("plural", fill_store)


# -- from tars and lists to samples/


def rows_of(store: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((store / "samples").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def texts_of(store: Path) -> list[str]:
    paths = sorted((store / "nodes").glob("*.parquet"))
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def captions_in(store: Path) -> list[list[tuple[str, float]]]:
    """What samples/ holds of each sample: its captions and their weights; each has the node of its text."""
    nodes, found = texts_of(store), []
    for row in rows_of(store):
        own = [(row["caption"], row["node"], row.get("weight", 1.0))]
        own += [(one["caption"], one["node"], one["weight"]) for one in row.get("more_captions") or []]
        for caption, node, _ in own:
            assert node is None or nodes[node] == " ".join(caption.split())
        found.append([(caption, round(weight, 6)) for caption, node, weight in own if node is not None])
    return found


def rejected_in(store: Path, stage: str = "scan") -> Counter[tuple[int, str]]:
    rows = [r for path in (store / f"rejected/{stage}").glob("*.parquet") for r in pq.read_table(path).to_pylist()]
    return Counter((row["position"], row["reason"]) for row in rows)


TARS = [
    sample("a b", caption="c d", captions=["e f", " a  b "]),
    sample("g h", caption="", captions=[]),
    sample(None, caption=7, captions=["k l", 3.5]),
    sample("\n", captions="m n"),
    sample(None, other="x"),
]


def test_captions_of_several_members_lists_and_fields_are_one_sample_s(tmp_path: Path, letters: str) -> None:
    write_tar(tmp_path / "tars/a.tar", TARS)
    store = build(
        tmp_path / "s", letters, "embed", shards=f"{tmp_path}/tars", caption_member="txt;json:caption;json:captions"
    )
    quarter = 0.25
    assert captions_in(store) == [
        [("a b", quarter), ("c d", quarter), ("e f", quarter), (" a  b ", quarter)],
        [("g h", 1.0)],
        [("k l", 1.0)],  # the encoder knows no digits
        [("m n", 1.0)],
        [],
    ]
    reasons = rejected_in(store)
    assert reasons[1, "empty caption"] == 1
    assert reasons[1, "json field 'captions' is an empty list"] == 1
    assert reasons[2, "no member .txt"] == 1
    assert reasons[2, "json field 'captions' is not a string"] == 1
    assert reasons[3, "empty caption"] == 1
    assert reasons[4, "member .json has no field 'caption'"] == 1
    counts = Store(str(store)).manifest()["stages"]["scan"]["counts"]
    assert counts["samples"] == 5
    assert counts["rejected"] == sum(reasons.values())
    assert counts["captions"] == 8
    build(store, letters, "index export")
    assert verify_store(Store(str(store))).problems == []


def test_lines_of_a_text_are_captions_where_asked_for(tmp_path: Path, letters: str) -> None:
    write_tar(tmp_path / "tars/a.tar", [sample("a b\n\n c d \r\ne f\n"), sample("one line")])
    store = build(tmp_path / "s", letters, "embed", shards=f"{tmp_path}/tars", caption_member="txt:lines")
    third = round(1 / 3, 6)
    assert captions_in(store) == [[("a b", third), (" c d ", third), ("e f", third)], [("one line", 1.0)]]


def test_more_than_a_hundred_captions_are_rejected_beyond(tmp_path: Path, letters: str) -> None:
    texts = [f"{a} {b}" for a in "abcdefghijk" for b in "lmnoprstuv"]
    write_tar(tmp_path / "tars/a.tar", [sample(None, captions=texts), sample("a")])
    store = build(tmp_path / "s", letters, "embed", shards=f"{tmp_path}/tars", caption_member="txt;json:captions")
    assert [text for text, _ in captions_in(store)[0]] == texts[: MAX_CAPTIONS - 1]  # the missing txt is one
    assert rejected_in(store)[0, "over 100 captions of one sample"] == len(texts) - MAX_CAPTIONS + 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("0.3,0.7", [[0.3, 0.7], [1.0], [1.0]]),
        ("3,0", [[1.0, 0.0], [1.0], [1.0]]),  # 0: taken only where nothing else is there
        ("json:w", [[0.2, 0.8], [1.0], []]),
    ],
)
def test_weights_are_of_the_captions_that_are_there(
    tmp_path: Path, letters: str, weights: str, expected: list[list[float]]
) -> None:
    given = [sample("a b", r="c d", w=[1, 4]), sample("", r="e f", w=[2, 3]), sample("g h", w=[1, 2, 3])]
    write_tar(tmp_path / "tars/a.tar", given)
    store = build(
        tmp_path / "s",
        letters,
        "embed",
        shards=f"{tmp_path}/tars",
        caption_member="txt;json:r",
        caption_weights=weights,
    )
    assert [[weight for _, weight in own] for own in captions_in(store)] == [
        [pytest.approx(weight, abs=1e-6) for weight in own] for own in expected
    ]
    if weights == "json:w":
        assert rejected_in(store)[2, "no 2 weights for its captions"] == 1


@pytest.mark.parametrize("kind", ["columns.csv", "columns.parquet", "lists.parquet", "lists.jsonl"])
def test_captions_of_several_columns_or_lists(tmp_path: Path, letters: str, kind: str) -> None:
    rows = [["a b", "c d"], ["e f", ""], ["", ""], ["g h", "a b"]]
    columns = {"one": [row[0] for row in rows], "two": [row[1] for row in rows]}
    path, changes = tmp_path / kind, {"caption_column": "one;two", "caption_weights": "0.25,0.75"}
    if kind == "columns.csv":
        path.write_text("one,two\n" + "".join(f"{a},{b}\n" for a, b in rows))
    elif kind == "columns.parquet":
        pq.write_table(pa.table(columns), path)
    else:
        changes = {"caption_column": "texts", "caption_weights": "w"}
        table = pa.table({"texts": rows, "w": [[0.25, 0.75]] * 4})
        if kind == "lists.parquet":
            pq.write_table(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    store = build(tmp_path / "s", letters, "embed", captions=str(path), **changes)
    assert captions_in(store) == [[("a b", 0.25), ("c d", 0.75)], [("e f", 1.0)], [("g h", 0.25), ("a b", 0.75)]]
    assert [row["key"] for row in rows_of(store)] == ["0", "1", "3"]
    assert rejected_in(store) == {(1, "empty caption"): 1, (2, "empty caption"): 2}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_list_without_a_caption_is_one_rejected_caption_of_its_column(
    tmp_path: Path, letters: str, suffix: str
) -> None:
    rows = [{"a": ["a b", "c d"], "b": ["e f"]}, {"a": [], "b": []}, {"a": ["g h"], "b": []}]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"a": "i j", "b": "k l"}]))
    last = [] if suffix == "parquet" else [["i j"]]
    store = build(tmp_path / "one", letters, "embed", captions=str(path), caption_column="a")
    assert [[text for text, _ in own] for own in captions_in(store)] == [["a b", "c d"], ["g h"], *last]
    assert [row["key"] for row in rows_of(store)] == ["0", "2", "3"][: 2 + len(last)]
    assert rejected_in(store) == {(1, "column 'a' is an empty list"): 1}
    assert Store(str(store)).manifest()["stages"]["scan"]["counts"]["rejected"] == 1
    both = build(tmp_path / "both", letters, "embed", captions=str(path), caption_column="a;b")
    assert len(captions_in(both)) == 2 + len(last)
    empty = "column 'b' is an empty list"
    assert rejected_in(both) == {(1, "column 'a' is an empty list"): 1, (1, empty): 1, (2, empty): 1}


def test_weights_in_decimals_are_numbers(tmp_path: Path, letters: str) -> None:
    weights = pa.array([[Decimal("0.25"), Decimal("0.75")]], pa.list_(pa.decimal128(4, 2)))
    pq.write_table(pa.table({"caption": [["a b", "c d"]], "w": weights}), tmp_path / "a.parquet")
    store = build(tmp_path / "s", letters, "embed", captions=str(tmp_path / "a.parquet"), caption_weights="w")
    assert captions_in(store) == [[("a b", 0.25), ("c d", 0.75)]]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (pa.array([["x", "y"]]), "column 'w' is list<"),
        (pa.array([[date(2024, 2, 29)]]), "column 'w' is list<"),
        (pa.array([0.5]), "column 'w' is double, not lists of numbers"),
        (pa.array(["words"]), "no row has a caption (2 rejected: no 2 weights"),
    ],
)
def test_a_column_that_holds_no_weights_is_refused_by_its_option(
    tmp_path: Path, letters: str, weights: pa.Array, said: str
) -> None:
    pq.write_table(pa.table({"caption": [["a b", "c d"]], "w": weights}), tmp_path / "a.parquet")
    with pytest.raises((InputError, StageError)) as error:
        build(tmp_path / "s", letters, "embed", captions=str(tmp_path / "a.parquet"), caption_weights="w")
    assert said in str(error.value)
    assert "--caption-weights" in str(error.value)
    assert "--caption-column" not in str(error.value)


def test_a_caption_without_a_vector_leaves_the_others_and_a_first_one_its_place(tmp_path: Path, letters: str) -> None:
    given = [sample(EMOJI, r="a b"), sample("c d", r=EMOJI), sample(EMOJI, r=EMOJI), sample("a b", r="c d")]
    write_tar(tmp_path / "tars/a.tar", given)
    store = build(tmp_path / "s", letters, "embed", shards=f"{tmp_path}/tars", caption_member="txt;json:r")
    assert captions_in(store) == [[("a b", 1.0)], [("c d", 1.0)], [], [("a b", 0.5), ("c d", 0.5)]]
    lost = "the encoder gives no vector"
    assert rejected_in(store, "assign") == {(0, lost): 1, (1, lost): 1, (2, lost): 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_member": "txt;;json:a"}, "1 to 100 sources"),
        ({"caption_member": "txt;txt"}, "each once"),
        ({"caption_member": "txt;json:a", "caption_weights": "1"}, "2 numbers"),
        ({"caption_member": "txt;json:a", "caption_weights": "1,-1"}, "2 numbers"),
        ({"caption_member": "txt;json:a", "caption_weights": "0,0"}, "not all 0"),
        ({"caption_member": "txt;json:a", "caption_weights": "w"}, "neither numbers"),
        ({"caption_member": "cls;txt", "class_names": "n.txt"}, "class names belong to one"),
    ],
)
def test_sources_and_weights_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(Store(str(tmp_path / "s")), "embed", {"shards": str(tmp_path), **changes})


def test_tars_that_come_later_may_have_one_caption_and_change_nothing(tmp_path: Path, letters: str) -> None:
    write_tar(tmp_path / "tars/a.tar", many(9))
    store = build(tmp_path / "s", letters, shards=f"{tmp_path}/tars", caption_member="txt;json:captions")
    before = captions_in(store)
    write_tar(tmp_path / "tars/b.tar", [sample(f"{word} {word}") for word in WORDS], 9)
    build(store, letters, shards=f"{tmp_path}/tars", caption_member="txt;json:captions")
    assert captions_in(store)[:9] == before
    assert "more_captions" not in pq.read_schema(store / "samples/00001.parquet").names
    assert verify_store(Store(str(store))).problems == []
    batch = next(iter(graph_webdataset(f"{tmp_path}/tars/*.tar", sidecars=store / "shards", batch_size=17, shuffle=0)))
    assert batch["caption"] == [own[0][0] for own in captions_in(store)]
    fresh = build(tmp_path / "t", letters, shards=f"{tmp_path}/tars", caption_member="txt;json:captions")
    for path in (*fresh.glob("samples/*"), *fresh.glob("nodes/*"), *fresh.glob("shards/*.graph.parquet")):
        assert path.read_bytes() == (store / path.relative_to(fresh)).read_bytes(), path.name


# -- batches


def streamed(big: Path, workers: int = 0, epoch: int = 0, skip: int = 0, **options: Any) -> list[dict[str, Any]]:
    dataset = graph_webdataset(
        f"{big}/tars/*.tar", sidecars=big / "store/shards", batch_size=10, image_pixels=8, seed=5, **options
    )
    dataset.set_epoch(epoch, skip)
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


def drawn_in(batches: list[dict[str, Any]]) -> dict[int, tuple[str, int]]:
    """Row -> its caption and node, of batches with one caption a sample."""
    found = [zip(b["row"].tolist(), b["caption"], b["node"].tolist(), strict=True) for b in batches]
    return {row: (caption, node) for batch in found for row, caption, node in batch}


def test_a_draw_is_the_same_in_stream_and_dataset_and_with_any_workers(big: Path) -> None:
    expected = [captions_of(members) for members in many(120)]
    one = drawn_in(streamed(big, captions="draw", epoch=3))
    assert len(one) == 120
    assert all(caption in expected[row] for row, (caption, _) in one.items())
    assert drawn_in(streamed(big, workers=2, captions="draw", epoch=3, shuffle=0)) == one
    assert drawn_in(streamed(big, workers=3, captions="draw", epoch=3)) == one
    assert drawn_in(streamed(big, captions="draw", epoch=4)) != one
    for graph in (None, SampleGraph.open(str(big / "store"))):
        dataset = GraphDataset(
            f"{big}/tars/*.tar", sidecars=big / "store/shards", graph=graph, image_pixels=8, captions="draw", seed=5
        )
        loader = DataLoader(
            dataset, batch_size=7, shuffle=True, collate_fn=dataset.collate, num_workers=1, persistent_workers=True
        )
        first = drawn_in(list(loader))
        dataset.set_epoch(3)
        assert drawn_in(list(loader)) == one
        assert first == drawn_in(streamed(big, captions="draw"))


def test_a_stream_that_goes_on_draws_what_it_would_have_drawn(big: Path) -> None:
    whole = streamed(big, workers=2, captions="draw", epoch=1)
    rest = streamed(big, workers=2, captions="draw", epoch=1, skip=5)
    assert [batch["caption"] for batch in rest] == [batch["caption"] for batch in whole[5:]]


def test_targets_of_drawn_captions_are_those_of_their_vectors(big: Path, letters: str) -> None:
    """By stored vectors to 1e-6, and by vectors that the encoder makes anew to float16."""
    stored = np.concatenate([np.load(path) for path in sorted((big / "store/nodes").glob("*.npy"))]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    texts, model = texts_of(big / "store"), SentenceTransformer(letters, device="cpu")
    for batch in streamed(big, captions="draw", epoch=2)[:4]:
        places = [texts.index(" ".join(caption.split())) for caption in batch["caption"]]
        assert batch["node"].tolist() == places
        direct = torch.from_numpy(stored[places] @ stored[places].T) / 0.1
        expected = torch.softmax(direct.fill_diagonal_(-torch.inf), dim=1)
        found = similarity_targets(batch["embedding"], tau_s=0.1, views=1)
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)
        anew = model.encode(batch["caption"], normalize_embeddings=True)
        assert np.abs(batch["embedding"].numpy() - anew).max() < 2e-3  # stored in float16
        for place, listed in zip(places, batch["neighbors"].tolist(), strict=True):
            similarity = stored @ stored[place]
            similarity[place] = -2
            assert sorted(similarity[listed]) == pytest.approx(sorted(similarity)[-K:], abs=1e-6)


@pytest.mark.slow
def test_draws_follow_the_weights_as_an_order_of_priorities_does(tmp_path: Path, letters: str) -> None:
    """Keys are drawn into an order by their weights, and the first that is there is taken: with open_clip's flags."""
    weights, keys, rng = [0.5, 0.3, 0.2], "abc", random.Random(0)
    given = [{key: f"{key} {n}" for key in keys if rng.random() < 0.7} or {"a": "a"} for n in range(6)]
    write_tar(tmp_path / "tars/a.tar", [sample(None, **fields) for fields in given])
    store = build(
        tmp_path / "s",
        letters,
        shards=f"{tmp_path}/tars",
        caption_member=";".join(f"json:{key}" for key in keys),
        caption_weights=",".join(map(str, weights)),
    )
    dataset = GraphDataset(f"{tmp_path}/tars/a.tar", sidecars=store / "shards", captions="draw", seed=1)
    counted: list[Counter[str]] = [Counter() for _ in given]
    for epoch in range(3_000):
        dataset.set_epoch(epoch)
        batch = dataset.collate(dataset.__getitems__(list(range(len(given)))))
        for row, caption in zip(batch["row"].tolist(), batch["caption"], strict=True):
            counted[row][caption[0]] += 1
    for fields, found in zip(given, counted, strict=True):
        expected: Counter[str] = Counter()
        for _ in range(20_000):
            left = dict(zip(keys, weights, strict=True))
            while (key := rng.choices(list(left), list(left.values()))[0]) not in fields:
                del left[key]
            expected[key] += 1
        for key in keys:
            assert found[key] / 3_000 == pytest.approx(expected[key] / 20_000, abs=0.04)


def test_all_captions_lie_side_by_side(big: Path) -> None:
    expected = [captions_of(members) for members in many(120)]
    vectors = SampleGraph.open(str(big / "store"))
    dataset = GraphDataset(f"{big}/tars/*.tar", sidecars=big / "store/shards", image_pixels=8, captions="all")
    for batch in [*streamed(big, captions="all"), dataset.collate(dataset.__getitems__([3, 100, 50, 7]))]:
        bounds = batch["offsets"].tolist()
        for row, begin, end in zip(batch["row"].tolist(), bounds[:-1], bounds[1:], strict=True):
            assert batch["caption"][begin:end] == expected[row]
            assert batch["weight"][begin:end].tolist() == pytest.approx([1 / (end - begin)] * (end - begin))
        assert len(batch["image"]) == len(batch["key"]) == len(bounds) - 1
        nodes = batch["node"].numpy()
        assert np.abs(batch["embedding"].numpy() - vectors.embeddings(nodes)).max() < 1e-6
        assert np.array_equal(batch["neighbors"].numpy(), vectors.neighbors(nodes)[0])
    with pytest.raises(ConfigError, match="gives batches"):
        dataset[0]


def test_the_mean_is_of_all_captions_with_all_their_neighbors(big: Path) -> None:
    graph, texts = SampleGraph.open(str(big / "store")), texts_of(big / "store")
    expected = [captions_of(members) for members in many(120)]
    dataset = GraphDataset(
        f"{big}/tars/*.tar", sidecars=big / "store/shards", graph=graph, image_pixels=8, captions="mean"
    )
    for batch in [*streamed(big, captions="mean"), dataset.collate(dataset.__getitems__([3, 100, 50, 7]))]:
        assert "node_count" not in batch  # similarities of means are not stored
        for i, row in enumerate(batch["row"].tolist()):
            nodes = [texts.index(" ".join(caption.split())) for caption in expected[row]]
            mean = graph.embeddings(nodes).astype(np.float64).mean(axis=0)
            assert np.abs(batch["embedding"][i].numpy() - mean / np.linalg.norm(mean)).max() < 1e-6
            ids, similarities = graph.neighbors(np.array(nodes))
            most: dict[int, float] = {}
            for node, similarity in zip(ids.ravel().tolist(), similarities.ravel().tolist(), strict=True):
                most[node] = max(most.get(node, -1.0), similarity)
            listed = batch["neighbors"][i] >= 0
            found = dict(zip(batch["neighbors"][i].tolist(), batch["similarities"][i].tolist(), strict=True))
            assert {node: found[node] for node in batch["neighbors"][i][listed].tolist()} == most
            assert int(listed.sum()) == len(most)


def test_the_mean_needs_embeddings_and_a_choice_a_known_name(tmp_path: Path, letters: str) -> None:
    write_tar(tmp_path / "tars/a.tar", many(9))
    store = build(tmp_path / "s", letters, shards=f"{tmp_path}/tars", embeddings="none")
    for choice, message in (("mean", "needs embeddings"), ("some", "use one of")):
        for loader in (graph_webdataset, GraphDataset):
            with pytest.raises(ConfigError) as error:
                loader(  # type: ignore[operator]
                    f"{tmp_path}/tars/a.tar",
                    sidecars=store / "shards",
                    captions=choice,
                    **({"batch_size": 3} if loader is graph_webdataset else {}),
                )
            assert message in f"{error.value.cause} {error.value.fix}"


# -- other layouts, and what looks at a store


def test_new_tars_carry_all_captions(big: Path, tmp_path: Path, letters: str) -> None:
    expected = [captions_of(members) for members in many(120)]
    store = build(tmp_path / "s", letters, shards=f"{big}/tars", caption_member="txt;json:captions", layout="inline")
    with tarfile.open(store / "inline/1.tar") as archive:
        found = {name: archive.extractfile(name).read() for name in archive.getnames() if name.endswith(".npz")}  # type: ignore[union-attr]
    graph = SampleGraph.open(str(store))
    assert len(found) == 40
    for name, content in found.items():
        arrays = np.load(io.BytesIO(content))
        own = expected[int(name[:3])]
        assert arrays["captions"].tolist() == own if len(own) > 1 else "captions" not in arrays
        nodes = [int(arrays["node"]), *(arrays["more_node"].tolist() if len(own) > 1 else [])]
        vectors = np.stack([arrays["embedding"], *(arrays["more_embedding"] if len(own) > 1 else [])])
        assert np.abs(vectors.astype(np.float32) - graph.embeddings(nodes)).max() < 1e-3
    build(store, letters, "export", layout="clustered")
    batches = graph_webdataset(f"{store}/clustered/*.tar", batch_size=120, shuffle=0, captions="all")
    (batch,) = list(batches)
    bounds = batch["offsets"].tolist()
    for row, begin, end in zip(batch["row"].tolist(), bounds[:-1], bounds[1:], strict=True):
        assert batch["caption"][begin:end] == expected[row]
    assert verify_store(Store(str(store))).problems == []


def test_look_ups_find_samples_by_any_of_their_captions(big: Path) -> None:
    expected, texts = [captions_of(members) for members in many(120)], texts_of(big / "store")
    graph, catalog = SampleGraph.open(str(big / "store")), Catalog(Store(str(big / "store")))
    for node, text in enumerate(texts):
        rows = [row for row, own in enumerate(expected) if text in own]
        assert graph.samples_of(node).tolist() == rows
        first = catalog.sample_of(node)
        assert first is not None
        assert first.row == rows[0]
        assert first.captions == " · ".join(expected[rows[0]])


def test_near_duplicates_keep_a_sample_of_each_group(big: Path) -> None:
    table = near_duplicates(SampleGraph.open(str(big / "store")), 0.9).table()
    all_captions = [captions_of(members) for members in many(120)]
    for row in table.to_pylist():
        assert row["caption"] == all_captions[row["row"]][0]
        assert row["more_captions"] == all_captions[row["row"]][1:]
    kept = table.filter(table["keep"])
    assert sorted(kept["group"].to_pylist()) == sorted(set(table["group"].to_pylist()))


def test_hard_negatives_are_of_each_caption_of_a_sample(big: Path) -> None:
    graph, texts = SampleGraph.open(str(big / "store")), texts_of(big / "store")
    table = hard_negatives(graph, count=K, relative_margin=0).table()
    anchors = {(row["row"], row["node"]) for row in table.to_pylist()}
    own = [captions_of(members) for members in many(120)]
    assert anchors <= {(row, texts.index(text)) for row, captions in enumerate(own) for text in captions}
    assert {texts[node] for _, node in anchors if node is not None} >= {captions[1] for captions in own if captions[1:]}
    pairs = {(row["row"], texts[row["neighbor"]]) for row in table.to_pylist()}
    assert not pairs & {(row, text) for row, captions in enumerate(own) for text in captions}
    assert table["row"].to_pylist() == sorted(table["row"].to_pylist())
    for row in table.slice(0, 200).to_pylist():
        ids, similarities = graph.neighbors(np.array(row["node"]))
        assert ids[row["rank"] - 1] == row["neighbor"]
        assert similarities[row["rank"] - 1] == np.float32(row["similarity"])


def broken(table: pa.Table, how: str) -> pa.Table:
    """A sidecar of several captions with one fault, under its own header."""
    more = table["more_captions"].combine_chunks()
    texts = more.flatten()
    fields = {field.name: texts.field(number) for number, field in enumerate(texts.type)}
    match how:
        case "no node":
            fields["node"] = pa.array([None, *fields["node"].to_pylist()[1:]], pa.int64())
        case "another type":
            fields["node"] = fields["node"].cast(pa.float64())
        case "a field that is not there":
            del fields["caption"]
        case "a negative weight":
            fields["weight"] = pa.array([-1.0, *fields["weight"].to_pylist()[1:]], pa.float32())
        case "no weight":
            return table.drop_columns(["weight"])
    inner = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    made = pa.ListArray.from_arrays(more.offsets, inner)
    return table.set_column(table.schema.get_field_index("more_captions"), "more_captions", made)


@pytest.mark.parametrize(
    "how", ["no node", "another type", "a field that is not there", "a negative weight", "no weight"]
)
def test_a_sidecar_whose_further_captions_are_damaged_is_refused_by_name(big: Path, tmp_path: Path, how: str) -> None:
    for path in (big / "store/shards").glob("*.graph.parquet"):
        table = pq.read_table(path)
        pq.write_table(broken(table, how) if path.name.startswith("1.") else table, tmp_path / path.name)
    for loader in ("stream", "dataset"):
        with pytest.raises(ShardError, match=r"1\.graph\.parquet"):  # noqa: PT012 - here, or when it is read
            if loader == "stream":
                list(graph_webdataset(f"{big}/tars/*.tar", sidecars=tmp_path, batch_size=10, captions="all"))
            else:
                dataset = GraphDataset(f"{big}/tars/*.tar", sidecars=tmp_path, captions="all")
                dataset.__getitems__(list(range(40, 60)))
