"""Where everything lies in a store: each path once, `{}` a shard's name. What is inside: docs/reference/format.md."""

from __future__ import annotations

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
SHARDS = "shards.parquet"
STATE = "_state/{}"  # of a stage: a record a task
REJECTED = "rejected/{}"  # of a stage: what it turned away, with why

URLS = "_state/urls/{}.parquet"
SCANNED = "_state/scan/{}.parquet"
ROW_NODES = "_state/number/{}nodes.npy"  # of all captions, or of a group's: "00000."
NODE_COUNTS = "_state/number/{}counts.npy"
VECTOR_PLACES = "_state/number/places.npy"
SAMPLES = "samples/{}.parquet"
TEXTS = "nodes/{}.parquet"
TEXTS_ROWS = 1_000  # of a row group: a look-up of one node's text reads no others
TEXTS_OPTIONS = {"row_group_size": TEXTS_ROWS, "use_dictionary": ["samples"]}  # of the writer: texts are distinct
VECTORS = "nodes/{}.npy"

SCRATCH = "_work"
SORTED = "_work/sorted/{}/{}.rows"  # of a part of the leaders: their nodes, as codes leaves them for stage order
MOMENTS = "_state/moments/moments.npy"
PARTS = "_work/moments/{}.npy"
BASIS = "graph/basis.npy"
NEIGHBORS = "graph/{}.neighbors.npy"
SIMILARITIES = "graph/{}.similarities.npy"
BACKGROUND = "graph/{}.background.npy"
SKETCH = "graph/{}.sketch.npy"

SIDECAR = "shards/{}.graph.parquet"
LOCK = "_state/lock.json"


def shard_name(number: int) -> str:
    """What the files of a shard, and of a task that has a number, are named by: five digits, from 100,000 on more."""
    return f"{number:05d}"


def by_number(name: str) -> tuple[int, str]:
    """The key by which names of `shard_name`, or paths to them in one folder, sort as their numbers do."""
    return len(name), name
