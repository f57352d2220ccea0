"""Queries against a graph: brute force in float64, sentence-transformers itself, texts compared by plain Python, and
pictures that were made again smaller."""

from __future__ import annotations

import io
import tarfile
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, GraphbuildError
from graphbuild.graph.lists.derived import about
from graphbuild.graph.match import queries as asking
from graphbuild.graph.match.match import match_store
from graphbuild.graph.match.pictures import close_pairs, perceptual_hash
from graphbuild.graph.select.rules import select_store
from graphbuild.job.verbs import run_verb
from graphbuild.knn import queries as searching
from graphbuild.look.verify import verify_store
from graphbuild.mine import caption_queries, leaks, nearest_nodes, novel_queries, store_queries, vector_queries
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.graph.test_index import built

SUBJECTS = ["a dog", "two cats", "an old man", "a child", "three birds", "a woman in a hat", "the café", "a red train"]
ACTIONS = ["runs over", "waits beside", "looks at", "sleeps near", "jumps across", "stands under"]
PLACES = ["the sea", "a bridge", "the wet street", "a garden wall", "an empty field", "a snowy hill", "the market"]
SCENES = [f"{subject} {action} {place}" for subject in SUBJECTS for action in ACTIONS for place in PLACES]
LEAST = 0.85
UNSURE = 0.006  # the store's vectors are float16, of an encoder in bfloat16 where the CPU has it


def make_store(folder: Path, index: dict[str, Any] | None = None, **embed: Any) -> Store:
    store, recipe = Store(str(folder)), Recipe(embed=Embed(**embed), index=Index(**(index or {"k": 5})))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner)
    return store


def write_csv(path: Path, keys: list[str], captions: list[str]) -> str:
    pl.DataFrame({"key": keys, "caption": captions}).write_csv(path)
    return str(path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The first 250 of SCENES in mixed order, every fifth caption of two samples; keys s0, s1, ..."""
    folder = tmp_path_factory.mktemp("match")
    captions = np.random.default_rng(0).permutation(SCENES[:250] + SCENES[:250:5]).tolist()
    path = write_csv(folder / "scenes.csv", [f"s{row}" for row in range(len(captions))], captions)
    return make_store(folder / "store", captions=path, key_column="key", shard_size=70)


def samples_of(store: Store) -> list[dict[str, Any]]:
    return pl.read_parquet(f"{store.url}/samples/*.parquet").select("row", "key", "node", "caption").to_dicts()


def vectors_of(store: Store) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("nodes/*.npy"))]).astype(np.float64)


def unit(vectors: np.ndarray) -> np.ndarray:
    x = vectors.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


# -- by vector


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    """300 nodes of 24 dimensions, in three shards, a part of them twice; and 90 queries, 10 of them nodes."""
    draw = np.random.default_rng(5)
    centres = draw.standard_normal((40, 24))
    vectors = (centres[draw.integers(0, 40, 300)] + 0.5 * draw.standard_normal((300, 24))).astype(np.float16)
    vectors[200:230] = vectors[:30]
    others = (centres[draw.integers(0, 40, 80)] + 0.5 * draw.standard_normal((80, 24))).astype(np.float16)
    return built(tmp_path_factory.mktemp("points"), vectors, k=5), np.concatenate([others, vectors[:10]])


def expected_pairs(store: Store, asked: np.ndarray, k: int | None, least: float) -> list[tuple[int, int, float]]:
    """(query, node, cosine) by float64 over the stored numbers, of equal ones the smaller node."""
    halves = unit(asked).astype(np.float16)
    cosines = (unit(halves) @ unit(vectors_of(store)).T).astype(np.float32)
    pairs = []
    for query, row in enumerate(cosines):
        order = np.lexsort((np.arange(len(row)), -row))
        pairs += [(query, int(node), float(row[node])) for node in order[:k] if row[node] >= np.float32(least)]
    return pairs


@pytest.mark.parametrize(("k", "threshold"), [(7, None), (None, 0.6), (3, 0.6), (1000, None), (None, -1.0)])
def test_the_nearest_are_those_of_brute_force_however_they_are_cut(
    points: tuple[Store, np.ndarray], k: int | None, threshold: float | None, tmp_path: Path
) -> None:
    store, asked = points
    np.save(tmp_path / "asked.npy", asked)
    graph = SampleGraph.open(store.url)
    read = vector_queries(graph, str(tmp_path / "asked.npy"))
    found = nearest_nodes(graph, read, k=k, threshold=threshold)
    whole = found.table()
    rows = whole.to_pylist()
    expected = expected_pairs(store, asked, k, -1 if threshold is None else threshold)
    assert len(expected) > 90
    assert [(row["query"], row["node"]) for row in rows] == [(query, node) for query, node, _ in expected]
    np.testing.assert_allclose([row["similarity"] for row in rows], [value for *_, value in expected], atol=1e-7)
    ranks: dict[int, int] = defaultdict(int)
    for row in rows:
        ranks[row["query"]] += 1
        assert (row["rank"], row["row"], row["key"]) == (ranks[row["query"]], row["node"], str(row["node"]))
    assert found.counts == {"queries": 90, "rejected": 0, "queries_without_any": 90 - len(ranks)}
    with pytest.MonkeyPatch.context() as patches:
        for module, name, size in ((asking, "BLOCK", 7), (searching, "BLOCK_ROWS", 11), (searching, "PAIRS", 13)):
            patches.setattr(module, name, size)
        assert nearest_nodes(graph, read, k=k, threshold=threshold).table().equals(whole)


def test_a_pair_exactly_at_the_threshold_reaches_it(points: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    store, asked = points
    np.save(tmp_path / "asked.npy", asked)
    graph = SampleGraph.open(store.url)
    pairs = nearest_nodes(graph, vector_queries(graph, str(tmp_path / "asked.npy")), k=3).table()
    for value in np.unique(pairs["similarity"].to_numpy())[::9]:
        expected = {(query, node) for query, node, one in expected_pairs(store, asked, None, float(value))}
        read = vector_queries(graph, str(tmp_path / "asked.npy"))
        found = nearest_nodes(graph, read, threshold=float(value)).table().to_pydict()
        assert set(zip(found["query"], found["node"], strict=True)) == expected
        assert value in found["similarity"]


def test_vectors_without_a_direction_are_rejected_with_their_row_and_key(
    points: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    store, asked = points
    spoilt = asked[:5].astype(np.float32)
    spoilt[1], spoilt[3, 2] = 0, np.nan
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(spoilt.reshape(-1)), 24)
    pq.write_table(pa.table({"id": list("abcde"), "v": vectors}), tmp_path / "v.parquet")
    told = {"vectors": str(tmp_path / "v.parquet"), "vector_column": "v", "key_column": "id", "k": 1}
    assert "3 rows" in match_store(store, "neighbors", told)
    found = pl.read_parquet(f"{store.url}/match/neighbors.parquet")
    assert list(zip(found["query"], found["query_key"], strict=True)) == [(0, "a"), (2, "c"), (4, "e")]
    rejected = pl.read_parquet(f"{store.url}/rejected/match/neighbors.parquet")
    assert rejected["position"].to_list() == [1, 3]
    assert rejected["key"].to_list() == ["b", "d"]
    assert rejected["reason"].to_list() == ["is a zero vector", "holds NaN or infinity"]
    np.save(tmp_path / "asked.npy", asked)
    match_store(store, "neighbors", {"vectors": str(tmp_path / "asked.npy")})
    assert not store.exists("rejected/match/neighbors.parquet")  # of the list before


def test_novelty_is_by_the_formula_and_the_least_known_come_first(
    points: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    store, asked = points
    graph = SampleGraph.open(store.url)
    np.save(tmp_path / "asked.npy", asked)
    rows = novel_queries(graph, vector_queries(graph, str(tmp_path / "asked.npy")), k=4).table().to_pylist()
    near: dict[int, list[float]] = defaultdict(list)
    for query, _, value in expected_pairs(store, asked, 4, -1):
        near[query].append(value)
    assert len(rows) == len(near) == 90
    for row in rows:
        values = np.array(near[row["query"]])
        scores = [row["similarity"], row["novelty"], row["mean"], row["norm"]]
        expected = [values.max(), 1 - values.max(), values.mean(), np.sqrt((values**2).sum())]
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert [row["novelty"] for row in rows] == sorted((row["novelty"] for row in rows), reverse=True)
    assert {row["query"] for row in rows[-10:]} == set(range(80, 90))  # the nodes themselves


# -- by text


def planted(count: int, rest: list[str]) -> tuple[list[str], list[str]]:
    """Captions of a test set: so many that equal one of SCENES but for white space and composition, as many with a word
    more, and the rest."""
    exact = [unicodedata.normalize("NFD", text).replace(" ", "  ", 1) + " " for text in SCENES[:count]]
    return exact, [f"{text} today" for text in SCENES[100 : 100 + count]] + rest


def test_all_equal_texts_leak_and_the_near_ones_that_brute_force_finds(scenes: Store, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder

    exact, others = planted(40, ["the stock market fell", "how to cook rice", "x = y + 1"])
    asked = exact + others
    path = write_csv(tmp_path / "test.csv", [f"t{n}" for n in range(len(asked))], asked)
    told = {"captions": path, "key_column": "key", "threshold": LEAST}
    match_store(scenes, "leaks", told)
    found = pl.read_parquet(f"{scenes.url}/match/leaks.parquet").to_dicts()
    samples = samples_of(scenes)
    equal = {
        (number, sample["row"])
        for number, text in enumerate(asked)
        for sample in samples
        if plain(text) == plain(sample["caption"])
    }
    assert len({number for number, _ in equal}) == 40
    assert len(equal) > 40  # nodes of two samples: both leak
    assert {(row["query"], row["row"]) for row in found if row["by"] == "text"} == equal
    assert all(row["similarity"] == 1 for row in found if row["by"] == "text")

    model = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu")
    cosines = unit(model.encode([plain(text) for text in asked])) @ unit(vectors_of(scenes)).T
    near = {(row["query"], row["row"]): row["similarity"] for row in found if row["by"] == "vector"}
    sure = {
        (number, sample["row"])
        for number in range(len(asked))
        for sample in samples
        if cosines[number, sample["node"]] >= LEAST + UNSURE
    } - equal
    assert len(sure) > 40
    assert sure <= near.keys()
    for (number, row), value in near.items():
        assert value >= np.float32(LEAST)
        assert value == pytest.approx(cosines[number, samples[row]["node"]], abs=UNSURE)
    for row in found:
        sample = samples[row["row"]]
        assert (row["key"], row["node"], row["caption"]) == (sample["key"], sample["node"], sample["caption"])
        assert (row["query_key"], row["query_caption"]) == (f"t{row['query']}", asked[row["query"]])
    counts = about(f"{scenes.url}/match/leaks.parquet")["counts"]
    assert counts["leaked_samples"] == len({row["row"] for row in found})
    assert counts["leaked_queries"] == len({row["query"] for row in found})
    assert (counts["by_text"], counts["by_vector"]) == (len(equal), len(near))
    assert verify_store(scenes).problems == []


def test_without_a_threshold_texts_alone_are_compared_and_no_encoder_is_loaded(
    scenes: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, others = planted(12, [" ", "how to cook rice"])
    path = write_csv(tmp_path / "test.csv", [str(n) for n in range(26)], exact + others)
    monkeypatch.setattr(asking, "open_model", lambda *_: pytest.fail("an encoder was loaded"))
    found = leaks(SampleGraph.open(scenes.url), caption_queries(SampleGraph.open(scenes.url), path, vectors=False))
    assert set(found.table()["query"].to_pylist()) == set(range(12))
    assert found.counts["rejected"] == 1


def test_a_selection_drops_what_leaks(scenes: Store, tmp_path: Path) -> None:
    exact, others = planted(15, ["how to cook rice"])
    path = write_csv(tmp_path / "test.csv", [str(n) for n in range(31)], exact + others)
    match_store(scenes, "leaks", {"captions": path, "threshold": LEAST}, str(tmp_path / "leaks.parquet"))
    leaked = set(pl.read_parquet(tmp_path / "leaks.parquet")["row"])
    select_store(scenes, "clean", {"drop": [str(tmp_path / "leaks.parquet")]}, str(tmp_path / "clean.parquet"))
    kept = pl.read_parquet(tmp_path / "clean.parquet").filter("keep")["row"]
    assert len(leaked) > 15
    assert set(kept) == {sample["row"] for sample in samples_of(scenes)} - leaked


def test_of_another_store_each_caption_of_a_sample_asks_and_of_this_one_each_is_found(tmp_path: Path) -> None:
    for name, rows in {
        "train": [["a dog on a hill", "the wet market"], ["two cats", "three birds"], ["a red train", "a blue bus"]],
        "test": [["an apple", "three  birds"], ["a blue bus", "a lake"], ["nothing like it", "a lake"]],
    }.items():
        pq.write_table(
            pa.table({"caption": rows, "key": [f"{name}{n}" for n in range(3)]}), tmp_path / f"{name}.parquet"
        )
    train, test = (
        make_store(tmp_path / f"{name}-store", {"k": 2}, captions=str(tmp_path / f"{name}.parquet"), key_column="key")
        for name in ("train", "test")
    )
    graph = SampleGraph.open(train.url)
    found = leaks(graph, store_queries(graph, test.url, vectors=False)).table().to_pylist()
    names = ("query", "query_key", "query_caption", "row", "key", "caption", "by")
    assert [tuple(row[name] for name in names) for row in found] == [
        (0, "test0", "three  birds", 1, "train1", "three birds", "text"),
        (1, "test1", "a blue bus", 2, "train2", "a blue bus", "text"),
    ]
    pairs = nearest_nodes(graph, store_queries(graph, test.url), k=1).table().to_pylist()
    assert len(pairs) == 6
    assert [row["query"] for row in pairs] == [0, 0, 1, 1, 2, 2]


# -- by picture


def picture(seed: int) -> Image.Image:
    """Soft blobs of any colours: 160 x 120."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)


def write_tar(path: Path, pictures: dict[str, Image.Image | bytes], **saved: Any) -> str:
    with tarfile.open(path, "w") as tar:
        for key, image in pictures.items():
            made = io.BytesIO()
            if isinstance(image, Image.Image):
                image.save(made, "JPEG", **saved)
            for name, content in (
                (f"{key}.jpg", made.getvalue() or image),
                (f"{key}.txt", f"caption of {key}".encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)  # type: ignore[arg-type]
                tar.addfile(info, io.BytesIO(content))  # type: ignore[arg-type]
    return str(path)


def test_the_hash_is_that_of_the_formula() -> None:
    image = picture(1)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    place = np.arange(32)
    waves = np.cos(np.pi * np.outer(np.arange(8), 2 * place + 1) / 64)
    low = waves @ grey @ waves.T
    bits = (low > np.median(low)).reshape(-1)
    assert perceptual_hash(image) == sum(1 << (63 - at) for at in np.flatnonzero(bits).tolist())
    assert perceptual_hash(Image.new("RGB", (50, 50), "red")) is None


def test_pairs_of_hashes_are_those_of_plain_loops() -> None:
    draw = np.random.default_rng(2)
    some = draw.integers(0, 2**63, 40, dtype=np.uint64)
    others = np.concatenate([some[:20] ^ np.uint64(0b1011), draw.integers(0, 2**63, 700, dtype=np.uint64)])
    at, place, apart = close_pairs(some, others, 20)
    expected = [
        (i, j, bits)
        for i, one in enumerate(some.tolist())
        for j, other in enumerate(others.tolist())
        if (bits := (one ^ other).bit_count()) <= 20
    ]
    assert len(expected) >= 20
    assert list(zip(at.tolist(), place.tolist(), apart.tolist(), strict=True)) == expected


def test_pictures_leak_though_smaller_and_compressed_from_tars_and_from_a_store(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for tar in range(2):
        write_tar(tmp_path / f"train/{tar}.tar", {f"{tar}-{n}": picture(100 * tar + n) for n in range(20)}, quality=95)
    store = make_store(tmp_path / "store", shards=str(tmp_path / "train"))
    test = {f"t{n}": picture(n).resize((70, 50)) for n in (3, 7, 105, 111)}
    test |= {f"new{n}": picture(1000 + n) for n in range(10)} | {
        "one colour": Image.new("RGB", (9, 9)),
        "broken": b"no",
    }
    tar = write_tar(tmp_path / "test.tar", test, quality=60)
    assert "4 rows" in match_store(store, "leaks", {"images": tar})
    found = pl.read_parquet(f"{store.url}/match/leaks.parquet").to_dicts()
    names = ("query", "query_key", "row", "key", "caption", "by", "similarity")
    expected = [
        (0, "t3", 3, "0-3", "caption of 0-3", "picture", None),
        (1, "t7", 7, "0-7", "caption of 0-7", "picture", None),
        (2, "t105", 25, "1-5", "caption of 1-5", "picture", None),
        (3, "t111", 31, "1-11", "caption of 1-11", "picture", None),
    ]
    assert [tuple(row[name] for name in names) for row in found] == expected
    assert all(0 <= row["bits"] <= 4 for row in found)
    assert about(f"{store.url}/match/leaks.parquet")["counts"]["pictures_left_out"] == 2
    other = make_store(tmp_path / "other", shards=tar)
    match_store(store, "leaks", {"store": other.url, "bits": 4})
    of_store = pl.read_parquet(f"{store.url}/match/leaks.parquet").to_dicts()
    assert [tuple(row[name] for name in names) for row in of_store] == expected
    assert [row["query_caption"] for row in of_store] == [f"caption of {key}" for key in ("t3", "t7", "t105", "t111")]


def test_rows_of_pictures_are_the_stores_own_where_a_tar_is_gone(tmp_path: Path) -> None:
    stores = {}
    for name, begin in (("train", 0), ("test", 50)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / f"{name}/0.tar", {f"{name}{n}": picture(begin + n) for n in range(5)})
        write_tar(tmp_path / f"{name}/1.tar", {f"{name}{n}": picture(n) for n in range(5, 10)})
        stores[name] = make_store(tmp_path / f"{name} store", {"k": 2}, shards=f"{tmp_path}/{name}")
        (tmp_path / f"{name}/0.tar").unlink()
        recipe = Recipe(embed=Embed(shards=f"{tmp_path}/{name}"), index=Index(k=2))
        with Runner(workers=0) as runner:
            for verb in ("embed", "index"):
                run_verb(verb, recipe, stores[name], runner, force=True)
    names = ("query_key", "query_caption", "row", "key", "caption")
    rows = [(f"test{n}", n, f"train{n}", f"caption of train{n}") for n in range(5, 10)]
    for given in ({"images": f"{tmp_path}/test/1.tar"}, {"store": stores["test"].url, "bits": 4}):
        match_store(stores["train"], "leaks", given)
        found = pl.read_parquet(f"{stores['train'].url}/match/leaks.parquet")
        of_pictures = found.filter(pl.col("by") == "picture").to_dicts()
        captions = [None if "images" in given else f"caption of {key}" for key, *_ in rows]
        expected = [(key, caption, *rest) for (key, *rest), caption in zip(rows, captions, strict=True)]
        assert [tuple(row[name] for name in names) for row in of_pictures] == expected


# -- refusals


def test_queries_of_another_encoder_or_width_are_refused_by_name(
    scenes: Store, points: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    asked_of, of_points = SampleGraph.open(scenes.url), SampleGraph.open(points[0].url)
    tokenizer = Tokenizer(WordLevel({"a": 0, "dog": 1, "cat": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    other = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=384)])
    other.save(str(tmp_path / "encoder"))
    path = write_csv(tmp_path / "l.csv", list("abc"), ["a dog", "a cat", "dog cat"])
    static = make_store(tmp_path / "static", {"k": 1}, captions=path, encoder=str(tmp_path / "encoder"))
    with pytest.raises(ConfigError, match=r"vectors of another encoder: weights_sha256 .*MiniLM|encoder"):
        store_queries(asked_of, static.url)
    with pytest.raises(ConfigError, match="vectors of another encoder: encoder 'ready vectors'"):
        store_queries(asked_of, points[0].url)
    assert store_queries(asked_of, static.url, vectors=False).has_texts  # texts are texts
    with pytest.raises(ConfigError, match="no encoder for captions"):
        caption_queries(of_points, path)
    np.save(tmp_path / "narrow.npy", np.ones((3, 23)))
    with pytest.raises(ConfigError, match=r"narrow.npy holds vectors of 23 numbers; those of .* have 24"):
        vector_queries(of_points, str(tmp_path / "narrow.npy"))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=384)]).save(str(tmp_path / "encoder"))
    from graphbuild.nodes.encoder import find_encoder

    find_encoder.cache_clear()
    with pytest.raises(ConfigError, match="is another encoder than that of"):
        caption_queries(SampleGraph.open(static.url), path)


@pytest.mark.parametrize(
    ("what", "options", "named"),
    [
        ("neighbors", {}, "no queries given"),
        ("neighbors", {"captions": "{csv}", "vectors": "v.npy"}, "--captions and --vectors given"),
        ("neighbors", {"images": "a.tar"}, "--images has no meaning for neighbors"),
        ("leaks", {"images": "a.tar", "threshold": 0.9}, "--threshold has no meaning"),
        ("leaks", {"captions": "{csv}", "bits": 3}, "--bits has no meaning"),
        ("leaks", {"captions": "{csv}", "k": 3}, "--k has no meaning"),
        ("novel", {"captions": "{csv}", "threshold": 0.3}, "--threshold has no meaning"),
        ("neighbors", {"captions": "{csv}", "vector_column": "v"}, "--vector-column has no meaning"),
        ("neighbors", {"captions": "{csv}", "k": 0}, "k = 0"),
        ("leaks", {"captions": "{csv}", "threshold": 1.5}, "threshold = 1.5"),
        ("neighbors", {"captions": "{csv}", "caption_column": "words"}, "no column 'words'"),
        ("neighbors", {"captions": "none.csv"}, "none.csv does not exist"),
        ("leaks", {"images": "none*.tar"}, "no tar matches"),
        ("leaks", {"images": "none.tar"}, "has no tars, so no pictures"),
        ("leaks", {"store": "{store}"}, "is the store itself"),
        ("leaks", {"store": "{empty}"}, "has no nodes"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name_and_leaves_nothing(
    what: Any, options: dict[str, Any], named: str, scenes: Store, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "l.csv", ["k"], ["a dog"])
    words = {"csv": path, "store": scenes.url, "empty": str(tmp_path / "empty")}
    given = {name: value.format(**words) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(GraphbuildError, match=named):
        match_store(scenes, what, given, str(tmp_path / "out.parquet"))
    assert [one.name for one in tmp_path.iterdir()] == ["l.csv"]


def test_leaks_of_vectors_need_a_threshold(points: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    store, asked = points
    np.save(tmp_path / "asked.npy", asked)
    with pytest.raises(ConfigError, match="need --threshold"):
        match_store(store, "leaks", {"vectors": str(tmp_path / "asked.npy")})
    told = {"vectors": str(tmp_path / "asked.npy"), "threshold": 0.99}
    said = match_store(store, "leaks", told, dry_run=True)
    assert said == f"match     would compare with 300 nodes, into {store.url}/match/leaks.parquet"
    assert not store.exists("match/leaks.parquet")
    assert "rows" in match_store(store, "leaks", told)
    found = pl.read_parquet(f"{store.url}/match/leaks.parquet")
    assert set(range(80, 90)) <= set(found["query"])


@pytest.mark.slow
def test_a_thousand_leaks_planted_in_a_real_list_are_found(shared_data: Path, tmp_path: Path) -> None:
    """500 captions of a list of 20,000 with other white space, and 500 other captions of images whose caption is in it,
    beside 1,000 that are in neither."""
    from sentence_transformers import SentenceTransformer

    from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder

    least, draw = 0.8, np.random.default_rng(0)
    corpus = pl.read_parquet(shared_data / "captions/corpus.parquet")["caption"].to_list()
    flickr = pl.read_csv(shared_data / "images/flickr8k_captions.csv")["caption"].to_list()
    images = [flickr[at : at + 5] for at in range(0, 2500, 5)]
    of_flickr = {plain(text) for text in flickr}
    rest = [text for text in corpus if plain(text) and plain(text) not in of_flickr]
    rest = [rest[at] for at in draw.permutation(len(rest))[:21_000]]
    listed = rest[:19_500] + [image[0] for image in images]
    copied = [f" {text.replace(' ', chr(9), 1)}" for text in rest[:500]]
    asked = copied + [image[1] for image in images] + rest[20_000:]
    pq.write_table(pa.table({"caption": listed}), tmp_path / "list.parquet")
    pq.write_table(pa.table({"caption": asked}), tmp_path / "test.parquet")
    store = make_store(tmp_path / "store", captions=str(tmp_path / "list.parquet"))
    match_store(store, "leaks", {"captions": str(tmp_path / "test.parquet"), "threshold": least})
    found = pl.read_parquet(f"{store.url}/match/leaks.parquet").to_dicts()
    rows_of = defaultdict(set)
    for row, text in enumerate(listed):
        rows_of[plain(text)].add(row)
    equal = {(number, row) for number, text in enumerate(asked) for row in rows_of[plain(text)]}
    assert {number for number, _ in equal} >= set(range(500))
    assert {(row["query"], row["row"]) for row in found if row["by"] == "text"} == equal
    model = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu")
    texts = [plain(text) for text in asked]
    nodes = unit(vectors_of(store))
    cosines = unit(model.encode(texts, batch_size=64)) @ nodes.T
    node_of = {sample["row"]: sample["node"] for sample in samples_of(store)}
    near = {(row["query"], row["node"]) for row in found}
    true = set(map(tuple, np.argwhere(cosines >= least).tolist()))
    paraphrased = {number for number, _ in true if 500 <= number < 1000}
    assert len(paraphrased) > 100
    assert len(true & near) >= 0.99 * len(true)
    assert all(cosines[number, node] >= least - UNSURE for number, node in near)
    assert {node_of[row["row"]] == row["node"] for row in found} == {True}
