"""`graphbuild certify` on files as other tools write them: one certificate whatever the format, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from tests.e2e.test_bad_input import graphbuild, refused, succeeded
from tests.graph.test_certificate import D, K, N, clustered, graph, nearness


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """v.npy, g.npy, s.npy: float32 vectors and their exact graph by L2, with squared distances."""
    monkeypatch.chdir(tmp_path)
    vectors = clustered().astype(np.float32)
    lists, values = graph(nearness(vectors, "l2"))
    np.save("v.npy", vectors)
    np.save("g.npy", lists)
    np.save("s.npy", (values**2).astype(np.float32))
    return tmp_path


def certificate(*arguments: object) -> dict[str, object]:
    outcome = graphbuild("certify", *arguments, "--json", "-")
    found: dict[str, object] = json.loads(outcome.out)
    assert not found["faults"] or outcome.code == 1
    return found


def test_a_good_graph_is_printed_with_four_decimals_and_certified_in_json(folder: Path) -> None:
    out = succeeded(graphbuild("certify", "v.npy", "g.npy", "s.npy", "--json", "c.json", "--min-recall", "0.99"))
    assert "metric    l2 (by the similarities; they are squared L2 distance, off by 0.0000 in the median)" in out
    assert f"recall@{K} 1.0000 (95%: 0.9942 to 1.0000), of 500 nodes" in out
    assert "structure no fault" in out
    written = json.loads((folder / "c.json").read_text())
    assert (written["passed"], written["recall"], written["k"], written["lists"]) == (True, 1.0, K, N)
    assert written["files"]["neighbors"].startswith("g.npy, ")
    assert certificate("v.npy", "g.npy", "s.npy", "--min-recall", "0.99") == written, "and the same on stdout"


def test_formats_of_other_tools_have_the_same_certificate(folder: Path) -> None:
    vectors, lists, values = (np.load(f"{name}.npy") for name in ("v", "g", "s"))
    np.savez("v.npz", embedding=vectors, other=lists)
    np.savez_compressed("g.npz", neighbors=lists.astype(np.uint32), similarities=values)
    columns = {"embedding": list(vectors), "neighbors": list(lists.astype(np.int32)), "similarities": list(values)}
    pq.write_table(pa.table(columns), "t.parquet", row_group_size=100)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(lists.ravel()), K)
    pq.write_table(pa.table({"ids": fixed}), "fixed.parquet")
    rows = np.repeat(np.arange(N), K)
    matrix = scipy.sparse.csr_matrix(
        (values.ravel(), (rows, lists.ravel())), shape=(N, N)
    )  # by column, not by nearness
    scipy.sparse.save_npz("csr.npz", matrix)
    matrix.data[:] = 1
    scipy.sparse.save_npz("pairs.npz", matrix)
    scipy.sparse.save_npz("coo.npz", matrix.tocoo())
    expected = certificate("v.npy", "g.npy", "s.npy")
    assert expected["recall"] == 1
    for arguments in (
        ("v.npz", "g.npz", "g.npz"),
        ("t.parquet", "t.parquet", "t.parquet"),
        ("v.npy", "csr.npz"),
        ("v.npy", "csr.npz", "csr.npz"),
    ):
        found = certificate(*arguments)
        same = expected.keys() - {"files", "nearest_first"}
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}, arguments
    for lists_alone in (
        ("v.npy", "g.npy"), ("v.npy", "pairs.npz"), ("v.npy", "coo.npz"),
        ("v.npy", "fixed.parquet", "--neighbor-column", "ids"),
    ):  # fmt: skip
        found = certificate(*lists_alone)
        assert (found["metric"], found["metric_found_by"], found["recall"]) == ("l2", "the lists", 1.0), lists_alone


def test_lists_of_unequal_length_have_empty_places(folder: Path) -> None:
    lists, values = np.load("g.npy").tolist(), np.load("s.npy").tolist()
    lists[7], values[7] = lists[7][:-2], values[7][:-2]
    pq.write_table(pa.table({"neighbors": lists, "similarities": values}), "short.parquet")
    rows = np.repeat(np.arange(N), [len(one) for one in lists])
    flat = (np.concatenate(values), (rows, np.concatenate(lists).astype(int)))
    scipy.sparse.save_npz("short.npz", scipy.sparse.csr_matrix(flat, shape=(N, N)))
    for arguments in (("short.parquet", "short.parquet"), ("short.npz",)):
        found = certificate("v.npy", *arguments, "--sample", N)
        assert [(one["fault"], one["first"], one["lists"]) for one in found["faults"]] == [("missing", 7, 1)]  # type: ignore[attr-defined]
        assert found["worst_nodes"] == [{"node": 7, "recall": 1 - 2 / K}]


def test_a_broken_graph_and_one_under_the_floor_exit_with_1_after_their_certificate(folder: Path) -> None:
    lists = np.load("g.npy")
    lists[11, 2] = 11
    np.save("self.npy", lists)
    outcome = graphbuild("certify", "v.npy", "self.npy", "--json", "c.json")
    assert outcome.code == 1
    assert "BAD       self: list 11 names the node itself (1 do)" in outcome.out
    assert "self.npy is broken: self" in outcome.err
    assert not json.loads((folder / "c.json").read_text())["passed"]

    np.save(
        "half.npy",
        np.where(np.arange(N)[:, None] % 2, np.load("g.npy"), (np.arange(N)[:, None] + np.arange(1, K + 1)) % N),
    )
    outcome = graphbuild("certify", "v.npy", "half.npy", "--min-recall", "0.9")
    assert outcome.code == 1
    assert f"half.npy: recall@{K} is 0.5" in outcome.err
    assert f"recall@{K} 0.5" in outcome.out
    assert graphbuild("certify", "v.npy", "half.npy").code == 0, "without a floor it is only measured"


def test_lists_of_queries_and_lists_with_the_node_itself(folder: Path) -> None:
    queries = clustered(9)[:40].astype(np.float32)
    np.save("q.npy", queries)
    np.save("of_q.npy", graph(nearness(np.load("v.npy"), "cosine", queries))[0])
    found = certificate("v.npy", "of_q.npy", "--queries", "q.npy")
    assert (found["lists"], found["metric"], found["recall"]) == (40, "cosine", 1.0)
    with_self = np.column_stack([np.arange(N), np.load("g.npy")])
    np.save("own.npy", with_self)
    outcome = graphbuild("certify", "v.npy", "own.npy")
    assert outcome.code == 1
    assert "-> add --with-self if every list" in outcome.err
    found = certificate("v.npy", "own.npy", "--with-self")
    assert (found["k"], found["recall"], found["faults"]) == (K, 1.0, [])


def test_what_does_not_belong_together_or_cannot_be_read_is_refused_by_name(folder: Path) -> None:
    np.save("other.npy", clustered(5).astype(np.float32))
    refused(
        graphbuild("certify", "other.npy", "g.npy", "s.npy"), "s.npy: its similarities are of other vectors", "nearest:"
    )
    np.save("few.npy", np.load("g.npy")[:9])
    refused(graphbuild("certify", "v.npy", "few.npy"), "few.npy: NEIGHBORS have 9 lists", "--queries")
    np.save("narrow.npy", np.load("s.npy")[:, 1:])
    refused(graphbuild("certify", "v.npy", "g.npy", "narrow.npy"), "narrow.npy: SIMILARITIES are float32 [600, 7]")
    (folder / "cut.npy").write_bytes((folder / "g.npy").read_bytes()[:900])
    refused(graphbuild("certify", "v.npy", "cut.npy"), "cut.npy is not a whole .npy file", "cut")
    np.save("pickled.npy", np.array([{}]), allow_pickle=True)
    refused(graphbuild("certify", "v.npy", "pickled.npy"), "pickled.npy", "pickled objects")
    np.savez("pickled.npz", neighbors=np.array([{}]))
    refused(graphbuild("certify", "v.npy", "pickled.npz"), "pickled.npz")
    (folder / "bad.parquet").write_text("no parquet")
    (folder / "bad.npz").write_text("no zip")
    for name in ("bad.parquet", "bad.npz", "gone.npy", "gone.parquet"):
        refused(graphbuild("certify", "v.npy", name), name)
        refused(graphbuild("certify", name, "g.npy"), name)
    refused(graphbuild("certify", "v.npy", "g.txt"), "g.txt is no .npy, .npz or parquet file")
    pq.write_table(pa.table({"a": [[1]], "b": [1]}), "t.parquet")
    refused(
        graphbuild("certify", "v.npy", "t.parquet"),
        "t.parquet has no column 'neighbors'",
        "'a', 'b'",
        "--neighbor-column",
    )
    refused(graphbuild("certify", "v.npy", "t.parquet", "--neighbor-column", "b"), "column 'b' is int64")
    scipy.sparse.save_npz("wide.npz", scipy.sparse.csr_matrix((N, N + 1)))
    refused(graphbuild("certify", "v.npy", "wide.npz"), "wide.npz is over 601 nodes", "v.npy has 600")
    scipy.sparse.save_npz("none.npz", scipy.sparse.csr_matrix((N, N)))
    refused(graphbuild("certify", "v.npy", "none.npz"), "none.npz", "lists of 0 nodes")
    refused(graphbuild("certify", "v.npy", "g.npy", "--json", "no/c.json"), "--json no/c.json lies in no folder")
    vectors = np.load("v.npy")
    vectors[77, D // 2] = np.nan
    np.save("nan.npy", vectors)
    refused(graphbuild("certify", "nan.npy", "g.npy"), "the vector of row 77 ")


def test_neither_ray_nor_torch_nor_an_engine_is_loaded(folder: Path) -> None:
    code = """if True:
        import sys
        from graphbuild.cli import main
        sys.argv = ["graphbuild", "certify", "v.npy", "g.npy", "s.npy"]
        main.__globals__["app"](standalone_mode=False)
        assert not {"ray", "torch", "faiss", "numba"} & sys.modules.keys()
        assert not any(name.startswith("graphbuild.knn") for name in sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
