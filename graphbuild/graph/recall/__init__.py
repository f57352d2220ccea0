"""The certificate of a graph: structure, metric and recall, from arrays alone."""
