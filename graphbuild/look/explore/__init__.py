"""The graph explorer: a page on loopback to search, map and walk a store's graph (`graphbuild explore`)."""

from graphbuild.look.explore.server import serve
from graphbuild.look.explore.static import write_static

__all__ = ["serve", "write_static"]
