"""The graph: the stages that make and certify it, SampleGraph, mined lists, batches planned along it."""
