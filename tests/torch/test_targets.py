"""Targets against the formula of Sobal et al. written with loops in float64."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import DebiasedLoss, Targets, XSampleLoss, similarity_targets
from tests.graph.test_index import built


def written_out(texts: np.ndarray, tau_s: float, views: int, keep_self: bool = False) -> np.ndarray:
    texts = texts.astype(np.float64)
    texts = texts / np.sqrt((texts**2).sum(1, keepdims=True))
    images = len(texts)
    target = np.zeros((views * images, views * images))
    for i in range(views * images):
        for j in range(views * images):
            same_image = i % images == j % images
            similarity = 1.0 if same_image else float(texts[i % images] @ texts[j % images])
            target[i, j] = 0.0 if i == j and not keep_self else math.exp(similarity / tau_s)
        target[i] /= target[i].sum()
    return target


@pytest.fixture
def texts() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 5)) * np.arange(1, 7)[:, None]


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("tau_s", [0.05, 0.1, 1.0])
def test_equals_the_written_formula(texts: np.ndarray, tau_s: float, views: int) -> None:
    target = similarity_targets(torch.from_numpy(texts).float(), tau_s=tau_s, views=views)
    np.testing.assert_allclose(target, written_out(texts, tau_s, views), atol=1e-6)


def test_rows_sum_to_one_self_is_zero_and_no_gradient_flows(texts: np.ndarray) -> None:
    target = similarity_targets(torch.from_numpy(texts).float().requires_grad_(), tau_s=0.1)
    assert target.shape == (12, 12)
    assert target.dtype == torch.float32
    assert not target.requires_grad
    assert (target.diagonal() == 0).all()
    torch.testing.assert_close(target.sum(1), torch.ones(12))


def test_keeps_float64(texts: np.ndarray) -> None:
    target = similarity_targets(torch.from_numpy(texts), tau_s=0.02)
    np.testing.assert_allclose(target, written_out(texts, 0.02, 2), atol=1e-13)


def test_a_precomputed_block_gives_the_same_target_and_is_left_alone(texts: np.ndarray) -> None:
    unit = torch.nn.functional.normalize(torch.from_numpy(texts).float(), dim=1)
    block = unit @ unit.T
    block.fill_diagonal_(float("nan"))  # a graph stores no self edges
    before = block.clone()
    target = similarity_targets(similarities=block, tau_s=0.1)
    torch.testing.assert_close(target, similarity_targets(unit, tau_s=0.1))
    torch.testing.assert_close(block, before, equal_nan=True)


def test_int8_and_float16_embeddings_of_any_scale(texts: np.ndarray) -> None:
    stored = np.rint(texts / np.abs(texts).max(1, keepdims=True) * 127)
    expected = written_out(stored, 0.1, 2)
    np.testing.assert_allclose(
        similarity_targets(torch.from_numpy(stored).to(torch.int8), tau_s=0.1), expected, atol=1e-6
    )
    tiny, huge = torch.from_numpy(stored).half() * 2**-12, torch.from_numpy(stored).half() * 2**8
    np.testing.assert_allclose(similarity_targets(tiny, tau_s=0.1), expected, atol=1e-6)
    np.testing.assert_allclose(similarity_targets(huge, tau_s=0.1), expected, atol=1e-6)


def test_autocast_does_not_lower_the_precision(texts: np.ndarray) -> None:
    embeddings = torch.from_numpy(texts).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = similarity_targets(embeddings, tau_s=0.1)
    assert torch.equal(inside, similarity_targets(embeddings, tau_s=0.1))


def test_duplicate_captions_share_the_mass_with_the_other_view() -> None:
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    target = similarity_targets(texts, tau_s=0.01)
    torch.testing.assert_close(target[0], torch.tensor([0, 1 / 3, 0, 1 / 3, 1 / 3, 0]))
    torch.testing.assert_close(target[2], torch.tensor([0.0, 0, 0, 0, 0, 1]))


@pytest.mark.parametrize("tau_s", [0.0, -0.1, float("nan"), float("inf")])
def test_a_temperature_must_be_positive_and_finite(tau_s: float) -> None:
    with pytest.raises(ConfigError, match="tau_s"):
        similarity_targets(torch.eye(3), tau_s=tau_s)


def test_embeddings_or_similarities_but_not_both() -> None:
    with pytest.raises(ConfigError):
        similarity_targets(tau_s=0.1)
    with pytest.raises(ConfigError):
        similarity_targets(torch.eye(3), similarities=torch.eye(3), tau_s=0.1)


def test_one_view_of_one_image_has_nothing_to_find() -> None:
    with pytest.raises(ConfigError, match="nothing to find"):
        similarity_targets(torch.ones(1, 4), tau_s=0.1, views=1)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_unusable_embeddings_are_named(value: float) -> None:
    embeddings = torch.eye(4)
    embeddings[2] = value
    with pytest.raises(InputError, match=r"\[2\]"):
        similarity_targets(embeddings, tau_s=0.1)


@pytest.mark.parametrize(
    "embeddings", [torch.ones(4), torch.ones(2, 3, 4), torch.ones(4, 0), torch.ones(4, 4, dtype=torch.int64)]
)
def test_wrong_shapes_and_dtypes_raise(embeddings: torch.Tensor) -> None:
    with pytest.raises(InputError):
        similarity_targets(embeddings, tau_s=0.1)


def test_a_block_must_be_square_and_finite() -> None:
    with pytest.raises(InputError, match="square"):
        similarity_targets(similarities=torch.ones(3, 4), tau_s=0.1)
    with pytest.raises(InputError, match="NaN"):
        similarity_targets(similarities=torch.full((3, 3), float("nan")), tau_s=0.1)


def test_the_self_slot_can_be_kept(texts: np.ndarray) -> None:
    target = similarity_targets(torch.from_numpy(texts), tau_s=0.2, keep_self=True)
    np.testing.assert_allclose(target, written_out(texts, 0.2, 2, keep_self=True), atol=1e-13)


def test_targets_are_one_block_of_similarities_whatever_they_are_given_as(texts: np.ndarray) -> None:
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    np.testing.assert_allclose(Targets(embeddings=torch.from_numpy(texts)).block(), unit @ unit.T, atol=1e-13)
    labels = [3, 0, 3, 1, 1, 3]
    same = [[float(a == b) for b in labels] for a in labels]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8):
        assert Targets(labels=torch.tensor(labels, dtype=dtype)).block().tolist() == same
    known = torch.tensor(same) > 0
    known.fill_diagonal_(False)
    block = Targets(similarities=known).block()  # a mask of known positives is a block too
    assert block.dtype == torch.float32
    assert block.tolist() == same


def test_the_diagonal_of_a_block_is_one_unless_it_is_kept() -> None:
    given = torch.tensor([[0.2, 0.9], [0.1, float("nan")]])
    expected = torch.tensor([[1, 0.9], [0.1, 1]])
    assert torch.equal(Targets(similarities=given).block(), expected)
    with pytest.raises(InputError, match=r"1 of the batch's 2 images have NaN.*rows \[1\]"):
        Targets(similarities=given, keep_diagonal=True).block()
    given[1, 1] = 0.3
    assert torch.equal(Targets(similarities=given, keep_diagonal=True).block(), given)


def test_a_directed_block_stays_directed() -> None:
    block = Targets(similarities=torch.tensor([[0, 0.7], [0.0, 0]])).block()
    assert block[0, 1] == pytest.approx(0.7)
    assert block[1, 0] == 0


def test_targets_have_one_source_of_similarity() -> None:
    with pytest.raises(ConfigError, match="both embeddings and labels"):
        Targets(embeddings=torch.eye(3), labels=torch.arange(3))
    with pytest.raises(ConfigError, match="no embeddings, similarities, labels or edges"):
        Targets(class_priors=torch.zeros(3)).block()
    with pytest.raises(ConfigError, match="no class_priors"):
        Targets(labels=torch.arange(3)).priors()


@pytest.mark.parametrize("with_sketch", [True, False])
def test_a_block_of_edges_is_the_stored_lists_completed(with_sketch: bool) -> None:
    random = np.random.default_rng(3)
    images, k, tau_s = 40, 6, 0.07
    node = random.integers(0, 60, images)
    neighbors = np.stack([random.choice(60, k, replace=False) for _ in range(60)])[node]
    similarities = random.random((60, k)).astype(np.float16)[node]
    background = (random.random((60, 2)) / 5).astype(np.float32)[node]
    sketch = (random.normal(size=(60, 8)) / 2).astype(np.float32)[node]
    expected = np.zeros((images, images))
    for i in range(images):
        for j in range(images):
            absent = background[i, 0] + background[i, 1] ** 2 / (2 * tau_s)
            expected[i, j] = np.clip(sketch[i] @ sketch[j], -1, 1) if with_sketch else min(absent, 1)
            for one, other in ((j, i), (i, j)):  # an image's own list goes before the other's
                for neighbor, similarity in zip(neighbors[one], similarities[one], strict=True):
                    if neighbor == node[other]:
                        expected[i, j] = similarity
            if node[i] == node[j]:
                expected[i, j] = 1
    batch = {
        "node": node,
        "neighbors": neighbors,
        "similarities": similarities,
        "background": background,
        **({"sketch": sketch} if with_sketch else {}),
    }
    targets = Targets.from_batch({name: torch.from_numpy(values) for name, values in batch.items()}, tau_s=tau_s)
    np.testing.assert_allclose(targets.block(), expected, atol=1e-6)


BLOCK = (np.eye(3, dtype=np.float32), np.ones((3, 3), bool))


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"similarities": BLOCK}, r"similarities are a tuple.*\n.*the first, as torch.from_numpy\(values\)"),
        ({"similarities": BLOCK[0]}, r"similarities are a ndarray.*\n.*torch.from_numpy\(array\)"),
        ({"embeddings": BLOCK[0]}, r"embeddings are a ndarray.*\n.*torch.from_numpy\(array\)"),
        ({"embeddings": {"embedding": torch.eye(3)}}, r"embeddings are a dict.*\n.*Targets.from_batch\(batch\)"),
        ({"labels": [0, 1, 2]}, r"labels are a list.*\n.*torch.tensor\(list\)"),
        ({"class_priors": np.full(3, 0.1)}, r"class_priors are a ndarray.*\n.*torch.from_numpy"),
        ({"edges": {"node": torch.arange(3)}}, r"edges are a dict.*\n.*Targets.from_batch\(batch\)"),
    ],
)
def test_what_is_no_tensor_is_refused_with_what_to_pass(given: dict[str, object], advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        Targets(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "advice"), [({"embedding": torch.eye(3)}, "from_batch"), (BLOCK, "block's two")])
def test_a_loss_refuses_what_are_no_targets(given: object, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        XSampleLoss()(torch.eye(3), torch.eye(3), given)


def test_missing_and_wrong_fields_of_a_batch_are_named() -> None:
    batch = {"node": torch.arange(3), "similarities": torch.zeros(3, 2), "background": torch.zeros(3, 2)}
    with pytest.raises(InputError, match=r"no embedding, and no neighbors, background\n"):
        Targets.from_batch({"node": batch["node"], "similarities": batch["similarities"]})
    with pytest.raises(InputError, match=r"neighbors is a ndarray.*\n.*torch.from_numpy"):
        Targets.from_batch({**batch, "neighbors": np.zeros((3, 2), np.int64)})
    with pytest.raises(InputError, match=r"embeddings are a ndarray.*\n.*torch.from_numpy"):
        Targets.from_batch({"embedding": np.eye(3)})


def test_the_documented_class_priors_are_the_share_of_the_samples(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "losses.md").read_text()
    snippets = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class_priors" in block]
    assert len(snippets) == 1
    # Four captions in three classes (the first two point the same way), with 30, 10, 40 and 20 samples.
    vectors = np.eye(4, 8, dtype=np.float16)
    vectors[1, :2] = [1, 0.1]
    graph = SampleGraph.open(built(tmp_path, vectors, k=3).url)
    node_of = np.repeat(np.arange(4), [30, 10, 40, 20])
    nodes = np.array([0, 1, 2, 3, 2])
    z = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    names = {"graph": Samples(graph, node_of), "nodes": nodes, "np": np, "torch": torch, "z1": z[0], "z2": z[1]}
    exec(snippets[0], {**names, "Targets": Targets, "DebiasedLoss": DebiasedLoss}, names)
    np.testing.assert_allclose(names["priors"], [0.4, 0.4, 0.4, 0.2, 0.4])


class Samples:
    """A graph whose nodes hold other samples; two more samples have no node."""

    def __init__(self, graph: SampleGraph, node_of: np.ndarray) -> None:
        self.neighbors = graph.neighbors
        self._nodes = graph
        self._node_of = np.concatenate([node_of, [-1, -1]])

    def __len__(self) -> int:
        return len(self._nodes)

    def sample_nodes(self) -> np.ndarray:
        return self._node_of


def test_embeddings_of_a_batch_come_first() -> None:
    batch = {"embedding": torch.eye(3), "node": torch.arange(3)}
    assert torch.equal(Targets.from_batch(batch).block(), torch.eye(3))


def test_edges_that_do_not_fit_raise() -> None:
    fields = {
        "node": torch.arange(3),
        "neighbors": torch.zeros(3, 2, dtype=torch.int64),
        "similarities": torch.zeros(3, 2),
        "background": torch.zeros(3, 2),
    }
    for wrong in ({"similarities": torch.zeros(3, 4)}, {"background": torch.zeros(3)}, {"sketch": torch.zeros(2, 4)}):
        with pytest.raises(InputError):
            Targets.from_batch({**fields, **wrong})
    with pytest.raises(InputError, match=r"no node: rows \[1\]"):
        Targets.from_batch({**fields, "node": torch.tensor([0, -1, 2])}).block()


def test_negative_labels_are_no_class() -> None:
    with pytest.raises(InputError, match=r"2 of the batch's 4 labels are negative: rows \[1, 3\]"):
        Targets(labels=torch.tensor([0, -1, 2, -1])).block()


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": torch.zeros(3)},
        {"labels": torch.zeros(3, 1, dtype=torch.int64)},
        {"class_priors": torch.zeros(3, dtype=torch.int64)},
        {"class_priors": torch.zeros(3, 1)},
        {"similarities": torch.zeros(3)},
        {"embeddings": torch.zeros(3)},
    ],
)
def test_wrong_shapes_and_dtypes_of_targets_raise_where_they_are_made(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match="pass"):
        Targets(**wrong)
