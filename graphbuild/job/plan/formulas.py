"""What each stage takes: rates (rates.py) times how much there is to do, a `Cost` a stage, with the reasons beside it.

Engines, list lengths, numbers of join tasks and bytes a node are those of graphbuild.knn.engine. Times of a GPU are
computed, never measured: operations / published peak + bytes / published bandwidth, thus a lower bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from graphbuild.export.clustered import RUN_SAMPLES, RUNS
from graphbuild.graph.certify import first_look
from graphbuild.graph.recall.recall import BLOCK_ROWS
from graphbuild.graph.sketch import BYTES as SKETCH_BYTES
from graphbuild.graph.tasks import PART_NODES, PARTS
from graphbuild.job.plan.encoder_facts import MINILM
from graphbuild.job.plan.job import Job
from graphbuild.job.plan.machine import Machine
from graphbuild.job.plan.rates import NEAR_BYTES, Rates
from graphbuild.knn import device as gpu
from graphbuild.knn.engine import Engine, bytes_a_node, choose, nodes_at_once
from graphbuild.knn.faiss_index import TASK_NODES as FAISS_TASK_NODES
from graphbuild.knn.leaders import (
    FLAT_GROUPS,
    GROUP_GROUPS,
    GROUP_LEADERS,
    MOST_GROUPS,
    NODES_PER_LEADER,
    ORDERED,
    PROBED_GROUPS,
    blocks_of,
    leader_count,
)
from graphbuild.knn.partition import FANS, MISSING_AFTER_REFINEMENT
from graphbuild.knn.sample import SAMPLE
from graphbuild.nodes.distinct import GROUP, STORE_BYTES, TASK_BYTES
from graphbuild.nodes.encode import STAGE as ENCODE
from graphbuild.nodes.encoder.model import CPU_TOKENS, GPU_TOKENS
from graphbuild.nodes.fidelity import SAMPLE as FIDELITY_TEXTS
from graphbuild.recipe import BESIDE, Index, Recipe
from graphbuild.sources.parts import BATCH_BYTES
from graphbuild.sources.pieces import PIECE_BYTES

CHUNK_ROWS = 100_000  # of a list that are read at a time
LINES = re.compile(r"\.(parquet|jsonl|tsv)$", re.IGNORECASE)  # lists that are read in pieces
FETCH_SECONDS = 1.2  # of a URL, dead ones too: img2dataset's page on CC3M has 850/s with 16 x 64 requests in flight
ORIGINAL_BYTES = 290_000  # of a web image: the same page, at 2 Gbit/s
PADDING = 1.05  # rows that a packed batch computes beside the tokens it has (benchmarks/embed.py: 4.7%)
ACTIVATION_BYTES = 60  # moved a token, layer and hidden unit by the encoder: 30 bfloat16 numbers read or written
CERTIFY_FLOPS = 1.1  # seconds of a FLOP of the certificate's products, which also compares, in units of such a FLOP's
# The interval of recall is about INTERVAL deviations of nodes' recalls over sqrt(n) wide; their variance is this share
# of recall (1 - recall): 0.12 on 50,000 captions at recall 0.965, 0.27 on 300,000 mixed vectors at 0.973.
# REACHED: what a graph misses, of what it was allowed to.
INTERVAL, NODE_VARIANCE, REACHED = 7.0, 0.2, 0.7
# The fan of partition: on 251,610 captions a share exp(-0.78 - 0.231 fan) of the true neighbours share no leaf, of
# which refinement leaves MISSING_AFTER_REFINEMENT (fans 7 and 14 for recall 0.95 and 0.99, benchmarks/results/
# knn.jsonl). It grows with N: cost grew with exponent 1.2 from 250,000 to 3,000,000 nodes, and goes with fan^2.
MISSED_AT_0, MISSED_BY_FAN, FAN_NODES, FAN_GROWTH = 0.78, 0.231, 250_000, 0.1
LEAF_SCAN = 2e-9  # seconds a number: a task looks through all nodes' leaves for its own
PAIR_BYTES = 19  # moved a pair on a GPU: int32 product out and in, float32 out and in, a byte of comparison out and in
# twice more for compaction (graphbuild.knn.device): 4 + 4 + 4 + 4 + 1 + 1 + 1
FAISS_PAIRS_FAR = 64  # vectors that an inverted-list search at the usual settings compares, in units of sqrt(N)
WIDTH = 384  # numbers of a vector, for which rates are


@dataclass(frozen=True)
class Cost:
    """What a stage takes; bytes of all its tasks, unless said otherwise."""

    tasks: int = 1  # still to run
    core_seconds: float = 0.0  # of a task
    read: float = 0.0  # bytes
    written: float = 0.0
    held: float = 0.0  # bytes of a task's arrays
    mapped: float = 0.0  # bytes of files that a node reads at random and would keep in its page cache
    vram: float = 0.0  # bytes of a GPU
    on_gpu: bool = False
    gpu_seconds: float = 0.0  # of a task, computed
    least_seconds: float = 0.0  # of the stage, whatever its cores do
    name: str = ""  # of the stage; this and what follows is set by costs.py
    title: str = ""
    seconds: float = 0.0  # until all tasks have run
    ram: float = 0.0  # bytes of a worker at most
    resident: float = 0.0  # ram, and a worker's share of what is mapped


@dataclass(frozen=True)
class Case:
    """What a formula gets: the job, its recipe, where it runs, and the rates of a core."""

    job: Job
    recipe: Recipe
    machine: Machine
    rates: Rates

    @property
    def shard_rows(self) -> float:
        return self.job.samples / self.job.shards

    @property
    def shard_nodes(self) -> float:
        return self.job.nodes / self.job.shards

    @property
    def width(self) -> float:
        return self.job.d / WIDTH

    @property
    def index(self) -> Index:
        """The recipe's section, its device settled as on that machine."""
        device = "cuda" if self.machine.card else "cpu"
        index = self.recipe.index
        return index if index.device != "auto" else index.model_copy(update={"device": device})

    @property
    def engine(self) -> Engine:
        return self.choice[0]

    @cached_property
    def choice(self) -> tuple[Engine, str]:
        """The engine that a build would choose there, and why."""
        return choose(self.index, self.job.nodes, self.job.d)

    def far(self, table_bytes: float) -> float:
        """How much longer random reads of a table take than of a small one."""
        beyond = max(1 - NEAR_BYTES / max(table_bytes, 1.0), 0.0)
        return 1 + (self.rates.far - 1) * beyond


def download_costs(case: Case) -> dict[str, Cost]:
    """From a list to tars."""
    job, config, machine, rates = case.job, case.recipe.download, case.machine, case.rates
    arrow = 3 * (CHUNK_ROWS + config.shard_size) * job.list_bytes / max(job.rows, 1)
    # The slowest of three: requests in flight (threads x workers, FETCH_SECONDS each), cores (an image's decoding and
    # scaling), and the link (ORIGINAL_BYTES an image). In memory: twice as many bodies as requests, an image decoded,
    # and the shard's rows.
    rows = min(config.shard_size, job.rows)
    seconds = max(rows * FETCH_SECONDS / config.threads, rows * job.success * rates.image)
    network = job.samples * ORIGINAL_BYTES
    held = 2 * config.threads * ORIGINAL_BYTES + 60e6 + rows * 3_000
    pieces = math.ceil(job.list_bytes / PIECE_BYTES) if LINES.search(config.urls or "") else 1
    listing = job.rows * rates.list_row / pieces
    tasks, written = math.ceil(job.rows / config.shard_size), job.tar_bytes + job.list_bytes * 0.8
    least_seconds = network / (machine.network * machine.nodes)
    return {
        **({"count": Cost(pieces, listing, job.list_bytes, 0.0, arrow)} if pieces > 1 else {}),
        "urls": Cost(pieces, listing, job.list_bytes, job.list_bytes * 0.6, arrow),
        "download": Cost(tasks, seconds, network, written, held, least_seconds=least_seconds),
    }


def pack_costs(case: Case) -> dict[str, Cost]:
    """From parquet or folders to tars: every image read, written and hashed."""
    job, rates = case.job, case.rates
    seconds = case.shard_rows * rates.tar_sample + job.tar_bytes / job.shards * rates.hash_byte
    return {"pack": Cost(job.shards, seconds, job.tar_bytes, job.tar_bytes, 4.0 * BATCH_BYTES)}


def embed_costs(case: Case) -> dict[str, Cost]:
    """From tars, captions or vectors to embeddings."""
    job, rates, rows, encoder = case.job, case.rates, case.shard_rows, case.job.encoder
    scanned = job.samples * (job.characters * 1.2 + 40)  # bytes
    if job.source == "captions":  # one task reads and cuts the list
        held = (CHUNK_ROWS + case.recipe.embed.shard_size) * (3 * job.characters + 300)
        scan = Cost(1, job.rows * rates.list_row, job.list_bytes, scanned, held)
    else:  # headers and captions of tars, and one pass for the sha256
        seconds = rows * rates.tar_sample + job.tar_bytes / job.shards * rates.hash_byte
        scan = Cost(job.shards, seconds, job.tar_bytes, scanned, rows * (3 * job.characters + 1_500))
    hashes = 8.0 * job.samples
    texts = job.samples * (job.characters + 40) + job.nodes * job.characters * 0.6
    checked = min(FIDELITY_TEXTS, math.ceil(job.nodes / 4)) * rates.fidelity_text * encoder.layers / MINILM.layers
    on_gpu = bool(case.machine.card) and case.recipe.embed.device != "cpu"
    vectors = 2.0 * job.d * job.nodes + 30 * job.nodes
    return {
        "scan": scan,
        **_numbering(case),
        "assign": Cost(job.shards, rows * rates.assign_row, scanned, texts, rows * (6 * job.characters + 600), hashes),
        "encode": _encode(case),
        # by sentence-transformers in float32, in one task, on a core or a GPU's core
        "fidelity": Cost(1, 0.0 if on_gpu else checked, on_gpu=on_gpu),
        "vectors": Cost(job.shards, rows * rates.vector_row * case.width, job.list_bytes, vectors, rows * job.d * 20.0),
    }


def _numbering(case: Case) -> dict[str, Cost]:
    """Over the 128-bit hashes of all captions: one task, or one a group and partition (graphbuild.nodes.distinct). The
    shares of the time are as measured."""
    job, row, beside = case.job, case.rates.number_row, case.recipe.embed.source == BESIDE
    captions = max(job.samples, job.nodes)
    groups = 1 if beside else math.ceil(captions / GROUP)
    size, bits, numbers = captions / groups, captions / 8, 8.0 * (captions + job.nodes)
    held = TASK_BYTES * size
    if groups == 1:  # with vectors beside tars over all keys
        return {"number": Cost(1, captions * row, 2 * numbers, numbers, 150.0 * captions if beside else held)}
    split, unique = 40.0 * captions, 16.0 * captions
    return {
        "split": Cost(groups, size * row, 16.0 * captions, split, held),
        "unique": Cost(groups, 0.7 * size * row, split, unique, held),
        "mark": Cost(groups, 0.1 * size * row, split + unique, numbers + bits, held),
        "number": Cost(
            groups, 0.07 * size * row, numbers + groups * bits, numbers, 0.7 * held + STORE_BYTES * captions
        ),
    }


def _encode(case: Case) -> Cost:
    """Cores: tokenising, and the layers' products, by FLOP in units of MiniLM's.

    GPU: 2 FLOP a weight and token and 4 T h a token for attention at the bfloat16 peak, and ACTIVATION_BYTES moved at
    the memory's. Workers share it and tokenise, on its share of the cores, while it computes: only what takes longer
    than that costs time.
    """
    job, rates, machine, encoder = case.job, case.rates, case.machine, case.job.encoder
    texts, tokens = case.shard_nodes, case.shard_nodes * job.tokens * PADDING
    held = texts * (3 * job.characters + 110 * job.tokens + 10 * job.d)
    cost = Cost(job.shards, 0.0, job.nodes * job.characters * 0.6, 2.0 * job.d * job.nodes, held)
    if not encoder.layers:
        return replace(cost, core_seconds=texts * rates.vector_row * case.width)
    card = machine.card if case.recipe.embed.device != "cpu" else None
    if card is None:
        tokens = max(tokens, math.ceil(texts * job.tokens / CPU_TOKENS) * CPU_TOKENS)
        return replace(cost, core_seconds=texts * rates.text + tokens * rates.token * encoder.layers / MINILM.layers)
    flop = 2 * encoder.layers + 4 * job.tokens * encoder.hidden * encoder.depth
    moved = ACTIVATION_BYTES * encoder.hidden * encoder.depth
    gpu_seconds = tokens * (flop / card.bfloat16 + moved / card.bytes_second)
    tokenising = texts * rates.text / max(machine.cores // machine.gpus, 1)
    vram = ENCODE.sharing * (1.5 * encoder.bytes + GPU_TOKENS * encoder.hidden * 40.0 + 0.5e9)
    seconds = max(tokenising - gpu_seconds, 0.0)
    return replace(cost, core_seconds=seconds, vram=vram, on_gpu=True, gpu_seconds=gpu_seconds)


def index_costs(case: Case) -> dict[str, Cost]:
    """From embeddings to a certified graph."""
    job, rates, shards, shard_nodes = case.job, case.rates, case.job.shards, case.shard_nodes
    vectors, kept, partition = 2.0 * job.nodes * job.d, 6.0 * job.k * job.first_new, case.engine.name == "partition"
    leaders = leader_count(job.nodes)
    drawn = 1.0 * leaders * job.d  # bytes
    # Partition reads all vectors, by ranges: SAMPLE nodes are searched among them, and the leaders copied, one node in
    # 64 (a random read each). Then, on all cores of a node, leaders are ordered by recursive bisection: 8 products of
    # [L, d] with a vector a level, bound by memory: 4 times a matrix product's time; beyond ORDERED one pass a level, a
    # tenth of the time to copy and code them.
    ranges = min(math.ceil(job.nodes / PART_NODES), PARTS, shards)
    tasks = ranges if partition and ranges > 1 else 0
    levels = max(math.log2(max(2 * min(leaders, ORDERED) / GROUP_LEADERS, 1)), 1)
    copying = leaders * rates.code_node * case.width
    ordering = 64.0 * leaders * job.d * levels * rates.flop / case.machine.cores
    ordering += copying * (1 + max(math.log2(leaders / ORDERED), 0.0) / 10)
    reading = copying + 2.0 * SAMPLE * job.nodes * job.d * rates.flop if partition else 0.0
    prepare = Cost(
        tasks + 1,
        reading / tasks if tasks else ordering + reading / case.machine.cores,
        (vectors if partition else drawn) + 2 * drawn,
        3 * drawn,
        14.0 * job.d * min(leaders, ORDERED) + 16.0 * leaders,
        vectors / max(tasks, 1),
        least_seconds=ordering,
    )
    # A node's leaders are found by L / 128 + 12 x 128 products, all L where they are few; where they are many, L / 128
    # of these by groups of groups.
    groups = leaders / GROUP_LEADERS
    compared = leaders if groups <= FLAT_GROUPS else groups + PROBED_GROUPS * GROUP_LEADERS
    while groups > MOST_GROUPS:
        groups /= GROUP_GROUPS
        compared += groups + PROBED_GROUPS * GROUP_GROUPS - groups * GROUP_GROUPS
    coding = shard_nodes * (rates.code_node + compared * rates.pair) * case.width
    matrix = 8.0 * job.d * (job.d + 1)  # of a shard's moments; one of them has its eigenvectors taken
    join, length, lists = _join(case)
    entries = 1.0 * job.nodes * length  # of candidate lists, one a node, united from `lists` a node
    merging = entries / shards * lists * rates.merge_entry
    # Candidates are scored again by the stored vectors, read at random. Partition, which looks at neighbours' lists
    # too, has those of near nodes behind each other, in blocks: a vector is read at random once, to be put there.
    table, scoring, blocks = vectors, shard_nodes * length * rates.candidate * case.far(vectors), shards
    ordered = refined = 0.0
    if partition:
        table, scoring, blocks = 8.0 * job.k * job.nodes, 0.0, len(blocks_of(job.nodes, job.first_new)) - 1
        ordered, refined = job.nodes * (3.0 * job.d + 50), job.nodes * length * rates.refine_entry * case.width
    scoring = (scoring + shard_nodes * rates.search_node) * case.width
    placing = join.tasks * job.nodes * LEAF_SCAN + job.nodes * (rates.order_node + rates.candidate * case.far(vectors))
    found = job.nodes * (6.0 * job.k + 8 + min(SKETCH_BYTES, job.d))
    held = shard_nodes * (24.0 * length + 10.0 * job.d)
    # Sampled nodes against all by float32 products, in looks, each of a task that draws and one a range of nodes; and
    # every list is looked over once.
    looks, searched = looks_of(case)
    checking = searched * (vectors * rates.flop * CERTIFY_FLOPS + job.k * rates.certified_edge)
    checking = (checking + job.nodes * job.k * rates.checked_entry) / (looks * ranges)
    tasks, written = join.tasks, job.nodes * (24.0 + job.d * (not partition))  # codes are made again in their place
    order = Cost(tasks + 1, placing / tasks, vectors, ordered, 5.0 * job.d * job.nodes / tasks, vectors)
    near = (3.0 * job.d + 16.0 * length) * job.nodes / blocks
    refine = Cost(blocks, refined / blocks, ordered + 8 * entries, table, near, near)
    return {
        "base": Cost(shards, 0.0, kept, kept),
        "prepare": prepare,
        "codes": Cost(shards, coding, vectors, written, shard_nodes * job.d * 5.0, drawn),
        "moments": Cost(1, shards * matrix / 1e9 + 2e-9 * job.d**3, shards * matrix, 2 * matrix),
        "order": order if partition else Cost(0),
        "join": join,
        "merge": Cost(blocks, merging * shards / blocks, 8 * entries * lists, 8 * entries, 16 * entries / blocks),
        "refine": refine if partition else Cost(0),
        "search": Cost(shards, scoring, table + 8.0 * entries, found, held, table),
        "certify": Cost(
            looks * ranges,
            checking,
            looks * vectors + 6.0 * job.k * job.nodes,
            held=searched / looks * BLOCK_ROWS * 5.0 + 20.0 * shard_nodes * job.k,
            mapped=vectors / ranges,
        ),
    }


def looks_of(case: Case) -> tuple[int, float]:
    """How often the certificate looks at recall, and how many nodes it has searched by then."""
    index, nodes = case.index, case.job.nodes
    sample = min(index.recall_sample, nodes)
    missing = 0.0 if case.engine.name == "exact" else (1 - index.recall) * REACHED
    wanted = min(NODE_VARIANCE * missing * (1 - missing) * (INTERVAL / max(index.recall_width, 1e-6)) ** 2, sample)
    searched = float(max(wanted, first := first_look(sample, nodes)))
    return 1 + math.ceil(math.log2(searched / first)), searched


def _join(case: Case) -> tuple[Cost, int, float]:
    """The join tasks of the engine that would be chosen, the length of a candidate list, and lists a node, one a task
    that it is in."""
    job, machine, rates, index, engine = case.job, case.machine, case.rates, case.index, case.engine
    nodes, new = job.nodes, job.nodes - job.first_new
    at_once = nodes_at_once(engine, index, nodes, job.d)
    tasks = len(engine.joins(nodes, at_once, job.first_new))
    held_nodes, lists = engine.spread(nodes, len(engine.joins(nodes, at_once)))
    held_nodes = min(held_nodes, nodes)
    length = engine.length(job.k, nodes)
    share = 1 - (job.first_new / nodes) ** 2  # of the pairs, that have a new node
    read, written = held_nodes * tasks * (job.d + 12.0), 8.0 * nodes * lists * (length + 1)
    held = held_nodes * bytes_a_node(engine, job.k, nodes, job.d)
    cost = Cost(tasks, 0.0, read, written, held, 1.0 * nodes * job.d)
    if engine.name == "exact" and machine.card is not None and index.device == "cuda":
        card = machine.card
        both = share * nodes**2 / tasks  # a GPU compares each pair from both sides
        seconds = both * (2.0 * job.d / card.int8 + PAIR_BYTES / card.bytes_second)
        vram = held_nodes * (job.d + 8.0) + 3 * 4.0 * gpu.ROWS * gpu.COLUMNS + 0.5e9
        cost = replace(cost, on_gpu=True, gpu_seconds=seconds, vram=vram)
    elif engine.name == "exact":
        pairs = share * nodes**2 / 2 / tasks
        filled = nodes * lists / tasks * length
        cost = replace(cost, core_seconds=pairs * rates.pair * case.width + filled * rates.list_entry)
    elif engine.name == "partition":
        fan = fan_of(index.recall, nodes)
        rows = nodes * fan / tasks * (new / nodes if job.first_new else 1.0)
        pairs = rows * NODES_PER_LEADER * fan / 2
        seconds = pairs * rates.pair * case.width + rows * length * rates.leaf_entry + nodes * fan * LEAF_SCAN
        read, mapped = cost.read + tasks * 4.0 * nodes * fan, nodes * (job.d + 4.0 * fan)
        cost = replace(cost, core_seconds=seconds, read=read, held=cost.held + 48.0 * rows, mapped=mapped)
    else:
        compared = min(FAISS_PAIRS_FAR * math.sqrt(nodes), nodes) * FAISS_TASK_NODES
        whole = 4.0 * nodes * job.d
        seconds = compared * 2 * job.d * rates.flop
        cost = replace(cost, core_seconds=seconds, read=whole * tasks, held=cost.held + whole, mapped=whole)
    return cost, length, lists


def fan_of(recall: float, nodes: int) -> float:
    """Leaves that a node must join for that recall, about: see the constants above."""
    fan = (-math.log((1 - recall) / MISSING_AFTER_REFINEMENT) - MISSED_AT_0) / MISSED_BY_FAN
    return float(min(max(fan, FANS[0]) * max(nodes / FAN_NODES, 1.0) ** FAN_GROWTH, FANS[-1]))


def export_costs(case: Case) -> dict[str, Cost]:
    """From a graph to sidecars, or to tars written once more: every member read, written and hashed."""
    job, config, rates, shards = case.job, case.recipe.export, case.rates, case.job.shards
    carried = {"int8": job.d + 4, "float16": 2 * job.d, "sketch:64": 64, "none": 0}[config.embeddings]
    row = carried + 6.0 * job.k + 40 + job.characters * 0.8  # of a sidecar: 6 bytes a neighbour; key, caption, places
    rows, edges, tars = job.samples * row, 1.0 * job.nodes * job.k, job.tar_bytes + job.samples * row
    copying, hashing = job.samples * (rates.tar_sample + row * rates.export_byte), tars * rates.hash_byte
    sidecar_held, lists = case.shard_rows * (4 * row + 16.0 * job.d), job.nodes * (2.0 * job.d + 6.0 * job.k)
    # Clustered: every byte is moved twice, in runs of old tars into scratch, and from there into new tars.
    run = max(min(job.samples / RUNS, RUN_SAMPLES), case.shard_rows)
    runs, tasks = math.ceil(job.samples / run), math.ceil(job.samples / config.shard_size)
    scattering, clustering = (copying + hashing) / runs, (rows * rates.export_byte + 2 * hashing) / tasks

    return {
        "export": Cost(shards, rows / shards * rates.export_byte, rows, rows, sidecar_held, lists),
        "inline": Cost(shards, (copying + hashing) / shards, job.tar_bytes, tars, 4 * case.shard_rows * (row + 500)),
        "columns": Cost(shards, rows / shards * rates.export_byte, rows, rows, sidecar_held, lists),
        # one task orders all samples, 40 bytes each, and reads the lists at random
        "arrange": Cost(1, 2 * edges * rates.merge_entry, 6 * edges, 8.0 * job.samples, 40.0 * job.samples),
        "scatter": Cost(runs, scattering, tars, tars, 2 * run * (row + 500) + sidecar_held, lists),
        "cluster": Cost(tasks, clustering, tars, tars, 4 * job.samples / tasks * (row + 500)),
    }


FORMULAS: dict[str, Callable[[Case], dict[str, Cost]]] = {
    "download": download_costs,
    "pack": pack_costs,
    "embed": embed_costs,
    "index": index_costs,
    "export": export_costs,
}
"""By verb."""
