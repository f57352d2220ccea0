"""Hard negatives beyond the nearest: drawn ones, those of another corpus, those that a cross-encoder scores, and
triplets that sentence-transformers trains on, against plain loops over the stored files."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists import derived
from graphbuild.graph.lists.mine import mine_store
from graphbuild.graph.match.match import match_store
from graphbuild.mine import hard_negatives
from graphbuild.store.store import Store
from tests.graph.test_index import built
from tests.graph.test_match import SCENES, make_store
from tests.graph.test_mine import clusters, lists, similarities

K = 12


@pytest.fixture(scope="module")
def plural(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """60 samples in three shards: of three captions, of two, of one in turn; k = 12."""
    folder = tmp_path_factory.mktemp("plural")
    texts = np.random.default_rng(1).permutation(SCENES).tolist()
    rows = [[texts.pop() for _ in range(3 - row % 3)] for row in range(60)]
    pq.write_table(pa.table({"caption": rows}), folder / "list.parquet")
    return make_store(folder / "store", {"k": K}, captions=str(folder / "list.parquet"), shard_size=25)


@pytest.fixture(scope="module")
def graph(plural: Store) -> SampleGraph:
    return SampleGraph.open(plural.url)


def texts_of(store: Store) -> list[str]:
    return pl.read_parquet(f"{store.url}/nodes/*.parquet").sort("node")["text"].to_list()


def captions_of(store: Store) -> list[tuple[int, int]]:
    """(row, node) of each caption, by row."""
    found = []
    for sample in pl.read_parquet(f"{store.url}/samples/*.parquet").sort("row").to_dicts():
        found += [
            (sample["row"], node) for node in (sample["node"], *(one["node"] for one in sample["more_captions"] or []))
        ]
    return found


def others_of(store: Store) -> dict[tuple[int, int], list[int]]:
    """Each caption's fellows, the nodes of the other captions of its sample."""
    of_row = defaultdict(list)
    for row, node in captions_of(store):
        of_row[row].append(node)
    return {(row, node): [one for one in of_row[row] if one != node] for row, node in captions_of(store)}


def passing(
    store: Store, value_of: Any, positive_of: Any, *, skip: int = 0, within: int = K, margin: float = 0.05
) -> dict[tuple[int, int], list[tuple[float, int, int]]]:
    """Of each caption its candidates that pass: (value, rank, node) by rank."""
    ids, _ = lists(SampleGraph.open(store.url))
    found = {}
    for (row, node), others in others_of(store).items():
        bound = positive_of(node, others)
        bound -= margin * abs(bound)
        scored = [(value_of(node, int(other)), rank, int(other)) for rank, other in enumerate(ids[node], 1)]
        found[row, node] = [
            one for one in scored if skip < one[1] <= within and one[2] not in others and np.float16(one[0]) < bound
        ]
    return found


def test_drawn_negatives_are_of_those_that_pass_and_evenly(plural: Store, graph: SampleGraph) -> None:
    exact = similarities(graph)
    expected = passing(plural, lambda a, b: exact[a, b], lambda *_: 1.0, skip=2, within=9)
    drawn: Counter[int] = Counter()
    tables = []
    for seed in range(40):
        found = hard_negatives(graph, count=3, skip=2, within=9, random=seed)
        tables.append(found.table())
        rows = tables[-1].to_pylist()
        of_anchor = defaultdict(list)
        for row in rows:
            of_anchor[row["row"], row["node"]].append((row["rank"], row["neighbor"]))
            drawn[row["rank"]] += 1
        for anchor, candidates in expected.items():
            assert set(of_anchor[anchor]) <= {(rank, node) for _, rank, node in candidates}
            assert len(of_anchor[anchor]) == min(3, len(candidates))
            assert of_anchor[anchor] == sorted(of_anchor[anchor])
    possible = Counter(rank for candidates in expected.values() for _, rank, _ in candidates)
    shares = np.array([drawn[rank] / possible[rank] / 40 for rank in range(3, 10)])
    assert np.ptp(shares) < 0.1
    assert not tables[0].equals(tables[1])
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(derived, "BLOCK", 3)
        assert hard_negatives(graph, count=3, skip=2, within=9, random=0).table().equals(tables[0])


def test_the_positive_of_captions_is_the_least_similar_other_one(plural: Store, graph: SampleGraph) -> None:
    exact = similarities(graph)
    expected = passing(
        plural,
        lambda a, b: exact[a, b],
        lambda node, others: min([exact[node, other] for other in others], default=1.0),
    )
    found = hard_negatives(graph, count=4, positive="captions").table().to_pylist()
    of_anchor = defaultdict(list)
    for row in found:
        of_anchor[row["row"], row["node"]].append(row["neighbor"])
    assert 0 < len(found) < 4 * len(expected)
    for anchor, candidates in expected.items():
        assert of_anchor[anchor] == [node for *_, node in candidates[:4]]


def test_candidates_may_be_the_nodes_that_match_found_for_another_corpus(plural: Store, tmp_path: Path) -> None:
    asked = [f"{text} at night" for text in SCENES[:30]]
    pq.write_table(pa.table({"caption": asked}), tmp_path / "asked.parquet")
    match_store(plural, "neighbors", {"captions": str(tmp_path / "asked.parquet"), "k": 6, "threshold": 0.5})
    path = f"{plural.url}/match/neighbors.parquet"
    pairs = pl.read_parquet(path)
    mine_store(plural, "hard-negatives", {"matches": path, "count": 2, "skip": 1, "positive": "0.9"})
    found = pl.read_parquet(f"{plural.url}/mined/hard-negatives.parquet")
    expected = []
    for query in pairs["query"].unique(maintain_order=True):
        own = pairs.filter(pl.col("query") == query).to_dicts()
        passed = [
            one for one in own if one["rank"] > 1 and np.float16(one["similarity"]) < np.float32(0.9 - 0.05 * 0.9)
        ]
        expected += [(query, one["node"], one["rank"], one["similarity"]) for one in passed[:2]]
    assert len(expected) > 30
    assert found.select("row", "neighbor", "rank", "similarity").rows() == expected
    assert found["node"].null_count() == len(found)
    mine_store(plural, "hard-negatives", {"matches": path, "count": 1, "skip": 1, "format": "triplets"})
    triplets = pl.read_parquet(f"{plural.url}/mined/hard-negatives.parquet")
    texts = texts_of(plural)
    assert set(triplets["anchor"]) <= set(asked)
    assert (triplets["anchor"] == triplets["positive"]).all()  # nothing else is said of a query
    second = {asked[one["query"]]: texts[one["node"]] for one in pairs.filter(pl.col("rank") == 2).to_dicts()}
    assert dict(triplets.select("anchor", "negative").rows()) == second


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers and random weights over the words of SCENES, with one score a pair."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import BertProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    folder = tmp_path_factory.mktemp("cross") / "encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in SCENES for word in text.split()})]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words), num_labels=1, initializer_range=1.0, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_cross_encoder_scores_candidates_and_positives_anew(
    plural: Store, graph: SampleGraph, cross_encoder: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    texts = texts_of(plural)

    def value_of(node: int, other: int) -> float:
        with torch.inference_mode():
            logits = model(**tokenizer(texts[node], texts[other], return_tensors="pt")).logits
        return float(torch.sigmoid(logits))

    expected = passing(
        plural, value_of, lambda node, others: min(value_of(node, one) for one in others or [node]), within=6
    )
    found = hard_negatives(graph, count=2, within=6, rescore=str(cross_encoder)).table().to_pylist()
    of_anchor = defaultdict(list)
    for row in found:
        of_anchor[row["row"], row["node"]].append(row)
    for anchor, candidates in expected.items():
        best = sorted(sorted(candidates, reverse=True)[:2], key=lambda one: one[1])
        assert [row["neighbor"] for row in of_anchor[anchor]] == [node for *_, node in best]
        assert [row["score"] for row in of_anchor[anchor]] == pytest.approx([value for value, *_ in best], abs=1e-4)
    ranks = [row["rank"] for row in found]
    assert len(found) > 60
    assert max(ranks) > 2  # not merely the nearest


@pytest.mark.parametrize("count", [1, 3])
def test_triplets_have_each_other_caption_as_a_positive(plural: Store, graph: SampleGraph, count: int) -> None:
    found = hard_negatives(graph, count=count, max_similarity=0.7, format="triplets")
    table = found.table()
    texts = texts_of(plural)
    of_anchor: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in hard_negatives(graph, count=count, max_similarity=0.7).table().to_pylist():
        of_anchor[row["row"], row["node"]].append(row["neighbor"])
    expected = [
        (texts[node], texts[other], *(texts[one] for one in of_anchor[row, node]))
        for (row, node), others in others_of(plural).items()
        if len(of_anchor[row, node]) == count
        for other in others or [node]
    ]
    assert len(expected) > 60
    assert list(zip(*table.to_pydict().values(), strict=True)) == expected
    assert table.column_names[2:] == (["negative"] if count == 1 else ["negative_1", "negative_2", "negative_3"])
    assert found.counts["triplets"] == len(expected)


def test_sentence_transformers_trains_on_the_file_as_it_is(plural: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    import torch
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    mine_store(plural, "hard-negatives", {"count": 2, "max_similarity": 0.7, "format": "triplets"})
    path = f"{plural.url}/mined/hard-negatives.parquet"
    data = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert data.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert data.to_dict() == pq.read_table(path).to_pydict()
    words = sorted({word for text in SCENES for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    before = model[0].embedding.weight.detach().clone()
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=8, report_to="none", use_cpu=True
    )
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=losses.MultipleNegativesRankingLoss(model))
    result = trainer.train()
    assert result.global_step == 1
    assert np.isfinite(result.training_loss)
    assert not torch.equal(before, model[0].embedding.weight)


def test_what_does_not_fit_is_refused_by_name(
    plural: Store, graph: SampleGraph, cross_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="do not lie within the first 3 ranks"):
        hard_negatives(graph, count=3, skip=1, within=3)
    with pytest.raises(ConfigError, match="random = -1"):
        hard_negatives(graph, count=2, random=-1)
    with pytest.raises(ConfigError, match="none cannot be loaded"):
        hard_negatives(graph, count=3, rescore=str(tmp_path / "none"))
    vectors = SampleGraph.open(built(tmp_path, clusters([3, 4, 5] * 4, 0.3), k=6).url)
    for options in ({"format": "triplets"}, {"rescore": str(cross_encoder)}):
        with pytest.raises(ConfigError, match="ready vectors have no texts"):
            hard_negatives(vectors, count=2, **options)
    mine_store(plural, "false-negatives", {"threshold": 0.5})
    with pytest.raises(InputError, match="is no list of neighbours"):
        hard_negatives(graph, matches=f"{plural.url}/mined/false-negatives.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="is no whole parquet file"):
        hard_negatives(graph, matches=str(tmp_path / "text.parquet"))
    np.save(tmp_path / "asked.npy", clusters([2, 3], 0.3))
    match_store(Store(vectors.url), "neighbors", {"vectors": str(tmp_path / "asked.npy"), "k": 3})
    path = f"{vectors.url}/match/neighbors.parquet"
    with pytest.raises(InputError, match="is of another graph"):
        hard_negatives(graph, matches=path)
    for options in (
        {"positive": "captions"},
        {"positive": np.ones(5)},
        {"positive": np.ones(5), "rescore": str(cross_encoder)},
    ):
        with pytest.raises(ConfigError, match="the anchors of --matches are queries"):
            hard_negatives(vectors, matches=path, count=1, **options)
    assert len(hard_negatives(vectors, matches=path, count=1, skip=1).table())
