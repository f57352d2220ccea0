"""The lists that docs/mining.md describes, by the path that it names; they are made in graphbuild/graph/mine.py."""

from graphbuild.graph.mine import (
    false_negative_edges,
    false_negatives,
    hard_negatives,
    near_duplicates,
    neighbor_positives,
)

__all__ = ["false_negative_edges", "false_negatives", "hard_negatives", "near_duplicates", "neighbor_positives"]
