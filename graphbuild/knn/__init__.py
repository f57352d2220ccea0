"""Neighbour-search engines: all-points k-nearest-neighbour search over the nodes' embeddings."""
