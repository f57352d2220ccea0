"""Questions to a graph: its nodes near captions, vectors or another store's, and what a test set leaks."""
