"""The graph explorer: a page on loopback to search, see and walk a store's graph (`graphbuild explore`)."""

from graphbuild.look.explore.server import serve

__all__ = ["serve"]
