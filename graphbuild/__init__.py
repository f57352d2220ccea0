"""graphbuild: sample similarity graphs for contrastive training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphbuild.graph.sample_graph import SampleGraph

__all__ = ["SampleGraph"]


def __getattr__(name: str) -> Any:  # the command line must start without loading numpy and torch
    if name == "SampleGraph":
        from graphbuild.graph.sample_graph import SampleGraph

        return SampleGraph
    raise AttributeError(f"module 'graphbuild' has no attribute {name!r}")
