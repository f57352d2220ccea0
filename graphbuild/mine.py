"""The lists of docs/how-to/mining.md and docs/how-to/matching.md, by the path that they name; made in graph/."""

from graphbuild.graph.lists.mine import (
    false_negative_edges,
    false_negatives,
    hard_negatives,
    near_duplicates,
    neighbor_positives,
)
from graphbuild.graph.match.match import leaks, nearest_nodes, novel_queries
from graphbuild.graph.match.queries import caption_queries, store_queries, vector_queries

__all__ = ["false_negative_edges", "false_negatives", "hard_negatives", "near_duplicates", "neighbor_positives"]
__all__ += ["caption_queries", "leaks", "nearest_nodes", "novel_queries", "store_queries", "vector_queries"]
