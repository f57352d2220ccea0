"""Node numbering against a dictionary in plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphbuild.nodes.captions import hashes
from graphbuild.nodes.number import number_nodes
from graphbuild.nodes.samples import NO_NODE


@given(st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "c", "dd", "é"]))))
def test_nodes_are_numbered_by_first_appearance(texts: list[str | None]) -> None:
    first: dict[str, int] = {}
    expected = [NO_NODE if text is None else first.setdefault(text, len(first)) for text in texts]
    nodes, counts = number_nodes(hashes(texts), np.ones(len(texts), bool))
    assert nodes.tolist() == expected
    assert counts.tolist() == [texts.count(text) for text in first]


@given(st.lists(st.text(max_size=3), min_size=1), st.lists(st.text(max_size=3)))
def test_more_samples_behind_never_renumber(texts: list[str], more: list[str]) -> None:
    before, _ = number_nodes(hashes(list(texts)), np.ones(len(texts), bool))
    after, _ = number_nodes(hashes(texts + more), np.ones(len(texts + more), bool))
    np.testing.assert_array_equal(before, after[: len(texts)])
