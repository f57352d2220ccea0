"""The graph: the stages that make and certify it, SampleGraph, mined lists, batches planned along it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphbuild.graph.sample_graph import SampleGraph

__all__ = ["SampleGraph"]


def __getattr__(name: str) -> Any:  # modules of this folder must load without one another
    if name == "SampleGraph":
        from graphbuild.graph.sample_graph import SampleGraph

        return SampleGraph
    raise AttributeError(f"module 'graphbuild.graph' has no attribute {name!r}")
