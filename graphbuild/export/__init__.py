"""What leaves a store: sidecars beside tars, tars with the graph inside, tars in the order of clusters."""
