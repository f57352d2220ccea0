"""The planning of neighbour-aware batches, without torch."""
