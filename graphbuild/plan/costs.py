"""The cost model: what each stage of a job takes on a machine. One function a stage, its formula and why beside it.

Times of cores come from this machine's calibration (`calibration.Rates`), each multiplied by how much there is to do; a
stage ends when its slowest slot does, so its time is rounds x a task's, and no less than its bytes over the network.
Times of a GPU are computed, never measured: operations / published peak + bytes / published bandwidth, and are thus a
lower bound. Memory is what a worker held in the calibration, and what the job's sizes add to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from graphbuild.certify import SLICE_NODES
from graphbuild.fidelity import SAMPLE as FIDELITY_TEXTS
from graphbuild.knn.leaders import FLAT_GROUPS, GROUP_LEADERS, PROBED_GROUPS, leader_count
from graphbuild.plan.calibration import CALIBRATED, Rates
from graphbuild.plan.engines import chosen_engine, join_cost
from graphbuild.plan.job import Job
from graphbuild.plan.machine import Machine
from graphbuild.recipe import Recipe

MINILM_LAYERS = 10.6e6  # weights that the calibrated encoder multiplies a token with
PADDING = 1.05  # rows that a packed batch computes beside the tokens it has (benchmarks/embed.py: 4.7%)
FETCH_SECONDS = 1.2  # of a URL, dead ones too: img2dataset's page on CC3M has 850/s with 16 x 64 requests in flight
ORIGINAL_BYTES = 290_000  # of a web image: the same page, at 2 Gbit/s
GPU_TOKENS = 65_536  # of a batch (graphbuild.encoder.model)
ACTIVATION_BYTES = 60  # moved a token, layer and hidden unit by the encoder: 30 bfloat16 numbers read or written
CHUNK_ROWS = 100_000  # of a list that are read at a time


@dataclass(frozen=True)
class Cost:
    """A stage. tasks: still to run; seconds: until all have; core_seconds: of one task; read, written: bytes in all;
    ram: bytes of one worker at most; mapped: bytes of files that a node reads at random and would keep in its page
    cache; vram: bytes of one GPU; computed: seconds that follow from a GPU's published figures."""

    name: str
    title: str
    tasks: int = 1
    core_seconds: float = 0.0
    read: float = 0.0
    written: float = 0.0
    held: float = 0.0
    mapped: float = 0.0
    vram: float = 0.0
    on_gpu: bool = False
    gpu_seconds: float = 0.0
    least_seconds: float = 0.0
    loading: float = 0.0
    seconds: float = 0.0
    ram: float = 0.0


@dataclass(frozen=True)
class Case:
    """What a stage's formula gets: the job, its recipe, where it runs, and this machine's rates."""

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
        """d, in units of the calibration's."""
        return self.job.d / CALIBRATED.d

    def far(self, table_bytes: float) -> float:
        """How much longer random reads of a table take than in the calibration, whose tables a cache holds."""
        beyond = max(1 - self.rates.cache_bytes / max(table_bytes, 1.0), 0.0)
        return 1 + (self.rates.far - 1) * beyond


def costs(case: Case, stages: list[str]) -> list[Cost]:
    """What the named stages (`graphbuild.stage.ORDER`) take, in their order."""
    found: list[Cost] = []
    loaded = False
    for name in stages:
        cost = FORMULAS[name](case)
        loading = case.rates.start if not found else 0.0
        if name == "encode" and not cost.on_gpu:
            loading += case.rates.load_encoder
        if name in ("prepare", "codes"):
            loading += case.rates.load_index - (case.rates.import_torch if "encode" in stages else 0.0)
        if name in ("certify", "export") and not loaded and "codes" not in stages:
            loading += case.rates.import_torch
            loaded = True
        found.append(_timed(replace(cost, loading=max(loading, 0.0)), case, with_encoder="encode" in stages))
    return found


def _timed(cost: Cost, case: Case, *, with_encoder: bool) -> Cost:
    """With its wall time and a worker's memory.

    Wall = rounds of tasks x seconds a task + the runner's own a task + its own a stage + loading; no less than the
    bytes over all nodes' links, where the store is shared, or over the disk's rate, where it is not.
    """
    rates, machine = case.rates, case.machine
    tasks = math.ceil(cost.tasks * (1 - case.job.done.get(cost.name, 0.0)))
    if tasks == 0:
        return replace(cost, tasks=0, read=0.0, written=0.0)
    rounds = math.ceil(tasks / machine.slots(on_device=cost.on_gpu))
    seconds = rounds * (cost.core_seconds + cost.gpu_seconds) + tasks * rates.task
    rate = machine.network * min(machine.nodes, tasks) if machine.shared else rates.disk_bytes_second
    moved = (cost.read if machine.shared else 0.0) + cost.written
    least = max(cost.least_seconds, moved / rate) * tasks / cost.tasks
    base = case.rates.memory
    key = cost.name if cost.name in base else {"download": "vectors", "urls": "vectors"}.get(cost.name, "search")
    before = base.get(f"with_encoder.{key}", base.get(key, 0.0)) if with_encoder else base.get(key, 0.0)
    if not before:
        before = base[f"with_encoder.{key}"]
    share = tasks / cost.tasks
    return replace(
        cost,
        tasks=tasks,
        seconds=max(seconds, least) + rates.stage + cost.loading,
        ram=before + cost.held,
        read=cost.read * share,
        written=cost.written * share,
    )


# -- download


def _urls(case: Case) -> Cost:
    """The list, read once by one task; a chunk of it and a shard's rows in memory as Arrow."""
    job = case.job
    bytes_a_row = job.list_bytes / max(job.rows, 1)
    return Cost(
        "urls",
        "URL list",
        1,
        job.rows * case.rates.list_row,
        job.list_bytes,
        job.list_bytes * 0.6,
        held=3 * (CHUNK_ROWS + case.recipe.download.shard_size) * bytes_a_row,
    )


def _download(case: Case) -> Cost:
    """The slowest of three: requests in flight (threads x workers, FETCH_SECONDS each), cores (an image's decoding and
    scaling), and the link (ORIGINAL_BYTES an image)."""
    job, config, machine = case.job, case.recipe.download, case.machine
    rows = min(config.shard_size, job.rows)
    fetching = rows * FETCH_SECONDS / config.threads
    images = rows * job.success * case.rates.image
    network = job.samples * ORIGINAL_BYTES
    tasks = math.ceil(job.rows / config.shard_size)
    return Cost(
        "download",
        "download",
        tasks,
        max(fetching, images),
        network,
        job.tar_bytes + job.list_bytes * 0.8,
        held=case.rates.image_memory + config.threads * 20e6 + rows * 3_000,
        least_seconds=network / (machine.network * machine.nodes),
    )


# -- embed


def _scan(case: Case) -> Cost:
    """Tars: their headers and captions, and one pass for the sha256. A list: one task reads and cuts it."""
    job, rates = case.job, case.rates
    written = job.samples * (job.characters * 1.2 + 40)
    if job.source == "captions":
        held = (CHUNK_ROWS + case.recipe.embed.shard_size) * (3 * job.characters + 300)
        return Cost("scan", "captions", 1, job.rows * rates.list_row, job.list_bytes, written, held=held)
    seconds = case.shard_rows * rates.tar_sample
    seconds += max(job.tar_bytes / job.shards - case.shard_rows * CALIBRATED.tar_sample_bytes, 0) * rates.hash_byte
    held = case.shard_rows * (3 * job.characters + 1_500)
    return Cost("scan", "captions", job.shards, seconds, job.tar_bytes, written, held=held)


def _number(case: Case) -> Cost:
    """One task over the 128-bit hashes of all samples: 150 bytes each (graphbuild.number)."""
    job = case.job
    held = 150.0 * max(job.samples - CALIBRATED.samples, 0)
    return Cost(
        "number",
        "numbering",
        1,
        job.samples * case.rates.number_row,
        16.0 * job.samples,
        8.0 * (job.samples + job.nodes),
        held=held,
    )


def _assign(case: Case) -> Cost:
    job = case.job
    written = job.samples * (job.characters + 40) + job.nodes * job.characters * 0.6
    return Cost(
        "assign",
        "nodes",
        job.shards,
        case.shard_rows * case.rates.assign_row,
        job.samples * (job.characters * 1.2 + 40),
        written,
        held=case.shard_rows * (6 * job.characters + 600),
        mapped=8.0 * job.samples,
    )


def _encode(case: Case) -> Cost:
    """Cores: tokenising, and the layers' products, by FLOP in units of MiniLM's.

    GPU: 2 FLOP a weight and token and 4 T h a token for attention at the bfloat16 peak, and ACTIVATION_BYTES moved at
    the memory's; one process a GPU tokenises on its share of the cores.
    """
    job, rates, machine = case.job, case.rates, case.machine
    texts = job.nodes / job.shards
    tokens = texts * job.tokens * PADDING
    held = texts * (3 * job.characters + 110 * job.tokens + 10 * job.d) + 1.5 * max(job.encoder_bytes - 91e6, 0)
    written = 2.0 * job.d * job.nodes
    cost = Cost("encode", "encoding", job.shards, read=job.nodes * job.characters * 0.6, written=written, held=held)
    if not job.layers:
        return replace(cost, core_seconds=texts * rates.vector_row * case.width)
    card = machine.card if case.recipe.embed.device != "cpu" else None
    if card is None:
        seconds = texts * rates.text + tokens * rates.token * job.layers / MINILM_LAYERS
        return replace(cost, core_seconds=seconds)
    flop = 2 * job.layers + 4 * job.tokens * job.hidden * job.depth
    moved = ACTIVATION_BYTES * job.hidden * job.depth
    batch = GPU_TOKENS * job.hidden * 40.0
    return replace(
        cost,
        on_gpu=True,
        core_seconds=texts * rates.text / max(machine.cores // machine.gpus, 1),
        gpu_seconds=tokens * (flop / card.bfloat16 + moved / card.bytes_second),
        vram=1.5 * job.encoder_bytes + batch + 0.5e9,
    )


def _fidelity(case: Case) -> Cost:
    """FIDELITY_TEXTS texts once more by sentence-transformers in float32, in one task, on a core or a GPU's core."""
    texts = min(FIDELITY_TEXTS, math.ceil(case.job.nodes / 4))
    seconds = texts * case.rates.fidelity_text * case.job.layers / MINILM_LAYERS
    on_gpu = bool(case.machine.card) and case.recipe.embed.device != "cpu"
    return Cost("fidelity", "fidelity", 1, 0.0 if on_gpu else seconds, on_gpu=on_gpu)


def _vectors(case: Case) -> Cost:
    job = case.job
    return Cost(
        "vectors",
        "vectors",
        job.shards,
        case.shard_rows * case.rates.vector_row * case.width,
        job.list_bytes,
        2.0 * job.d * job.nodes + 30 * job.nodes,
        held=case.shard_rows * job.d * 12,
    )


# -- index


def _base(case: Case) -> Cost:
    job = case.job
    return Cost("base", "old lists", job.shards, 0.0, 6.0 * job.k * job.first_new, 6.0 * job.k * job.first_new)


def _prepare(case: Case) -> Cost:
    """One task on all cores of a node. One node in 64 is drawn (a random read each) and ordered by recursive bisection
    (8 products of [L, d] with a vector a level); partition also searches 400 nodes among all (2 x 400 N d FLOP)."""
    job, rates = case.job, case.rates
    leaders = leader_count(job.nodes)
    levels = max(math.log2(max(leaders / 64, 1)), 1)
    flop = 16.0 * leaders * job.d * levels * 4  # such products are bound by memory: 4 times a matrix product's time
    engine = chosen_engine(case.recipe, job, case.machine)
    if engine.name == "partition":
        flop += 2.0 * 400 * job.nodes * job.d
    seconds = flop * rates.prepare_flop / case.machine.cores
    return Cost(
        "prepare",
        "prepare",
        1,
        seconds,
        2.0 * job.nodes * job.d if engine.name == "partition" else 2.0 * leaders * job.d,
        2.0 * leaders * job.d,
        held=14.0 * leaders * job.d,
        mapped=2.0 * job.nodes * job.d,
    )


def _codes(case: Case) -> Cost:
    """int8 codes and moments of a shard's nodes, and their nearest leaders: L / 128 + 12 x 128 products a node (all L
    where they are few). A task opens the leaders anew: their codes and float32 copy in every worker."""
    job, rates = case.job, case.rates
    leaders = leader_count(job.nodes)
    more = max(leader_products(job.nodes) - leader_products(CALIBRATED.nodes), 0)
    seconds = (
        case.shard_nodes * (rates.code_node + more * rates.pair) * case.width + leaders * rates.leader * case.width
    )
    return Cost(
        "codes",
        "codes",
        job.shards,
        seconds,
        2.0 * job.nodes * job.d,
        job.nodes * (job.d + 24.0),
        held=7.0 * max(leaders - leader_count(CALIBRATED.nodes), 0) * job.d + case.shard_nodes * job.d * 5,
    )


def leader_products(nodes: int) -> float:
    """Leaders that a node is compared with (graphbuild.knn.leaders)."""
    leaders = leader_count(nodes)
    groups = leaders / GROUP_LEADERS
    return leaders if groups <= FLAT_GROUPS else groups + PROBED_GROUPS * GROUP_LEADERS


def _moments(case: Case) -> Cost:
    """One task adds up [d + 1, d] float64 of each shard, and takes the eigenvectors of one such matrix."""
    job = case.job
    matrix = 8.0 * job.d * (job.d + 1)
    return Cost("moments", "moments", 1, job.shards * matrix / 1e9 + 2e-9 * job.d**3, job.shards * matrix, 2 * matrix)


def _join(case: Case) -> Cost:
    found = join_cost(case.recipe, case.job, case.machine, case.rates, case.far)
    return Cost(
        "join",
        "join",
        found.tasks,
        found.core_seconds,
        found.read,
        found.written,
        held=found.held,
        mapped=found.mapped,
        vram=found.vram,
        on_gpu=found.on_gpu,
        gpu_seconds=found.gpu_seconds,
    )


def _merge(case: Case) -> Cost:
    """Every list of a node, read and united entry by entry."""
    job = case.job
    found = join_cost(case.recipe, job, case.machine, case.rates, case.far)
    entries = case.shard_nodes * found.length * found.lists
    return Cost(
        "merge",
        "merge",
        job.shards,
        entries * case.rates.merge_entry,
        8.0 * job.nodes * found.length * found.lists,
        8.0 * job.nodes * found.length,
        held=16.0 * case.shard_nodes * found.length,
    )


def _search(case: Case) -> Cost:
    """Candidates scored again by the stored vectors, read at random; partition first looks at neighbours' lists."""
    job, rates = case.job, case.rates
    found = join_cost(case.recipe, job, case.machine, case.rates, case.far)
    table = 2.0 * job.nodes * job.d
    seconds = case.shard_nodes * found.length * rates.candidate * case.width * case.far(table)
    if found.engine == "partition":
        lists = job.nodes * (job.d + 8.0 * found.length)
        seconds = case.shard_nodes * rates.refine_node * case.width * found.length / CALIBRATED.leaf_length
        seconds *= case.far(lists)
        table += lists
    graph = job.nodes * (6.0 * job.k + 8 + min(64, job.d))
    return Cost(
        "search",
        "search",
        job.shards,
        seconds,
        table + 8.0 * job.nodes * found.length,
        graph,
        held=case.shard_nodes * (24.0 * found.length + 10.0 * job.d),
        mapped=table,
    )


def _certify(case: Case) -> Cost:
    """S sampled nodes against all N by float32 products, SLICE_NODES a task; and every list is looked over once."""
    job = case.job
    sample = min(case.recipe.index.recall_sample, job.nodes)
    tasks = math.ceil(sample / SLICE_NODES)
    seconds = (sample / tasks) * job.nodes * job.d * case.rates.certify_mac
    read = tasks * 2.0 * job.nodes * job.d + 6.0 * job.k * job.nodes
    return Cost("certify", "recall", tasks, seconds, read, 0.0, mapped=2.0 * job.nodes * job.d)


# -- export


def row_bytes(job: Job, embeddings: str) -> float:
    """A sidecar's row: what it carries of the embedding, 6 bytes a neighbour, and key, caption and places."""
    carried = {"int8": job.d + 4, "float16": 2 * job.d, "sketch:64": 64, "none": 0}[embeddings]
    return carried + 6.0 * job.k + 40 + job.characters * 0.8


def _export(case: Case) -> Cost:
    """Rows gathered by node and written; 100 bytes of a row beside its embedding and neighbours."""
    job = case.job
    row = row_bytes(job, case.recipe.export.embeddings)
    seconds = case.shard_rows * case.rates.export_row * row / CALIBRATED.row_bytes
    return Cost(
        "export",
        "export",
        job.shards,
        seconds,
        job.samples * row,
        job.samples * row,
        held=4 * case.shard_rows * row,
        mapped=job.nodes * (2.0 * job.d + 6.0 * job.k),
    )


def _copy(name: str, title: str, shards_of: Callable[[Case], int]) -> Callable[[Case], Cost]:
    def formula(case: Case) -> Cost:
        """Tars written once more: every member read and written, hashed, and the fields beside or inside."""
        job = case.job
        tasks = shards_of(case)
        row = row_bytes(job, case.recipe.export.embeddings)
        bytes_ = job.tar_bytes + job.samples * row
        seconds = (
            job.samples * (case.rates.tar_sample + case.rates.export_row) + bytes_ * case.rates.hash_byte
        ) / tasks
        return Cost(name, title, tasks, seconds, job.tar_bytes, bytes_, held=4 * job.samples / tasks * (row + 500))

    return formula


def _arrange(case: Case) -> Cost:
    """One task orders all samples: about 40 bytes each, and the lists read at random."""
    job = case.job
    seconds = job.nodes * job.k * case.rates.merge_entry * 2
    return Cost("arrange", "order", 1, seconds, 6.0 * job.k * job.nodes, 8.0 * job.samples, held=40.0 * job.samples)


def _scatter(case: Case) -> Cost:
    job = case.job
    size = job.samples * (job.characters + 300.0)
    return Cost(
        "scatter", "places", job.shards, case.shard_rows * case.rates.assign_row, size, size, held=size / job.shards
    )


FORMULAS: dict[str, Callable[[Case], Cost]] = {
    "urls": _urls,
    "download": _download,
    "scan": _scan,
    "number": _number,
    "assign": _assign,
    "encode": _encode,
    "fidelity": _fidelity,
    "vectors": _vectors,
    "base": _base,
    "prepare": _prepare,
    "codes": _codes,
    "moments": _moments,
    "join": _join,
    "merge": _merge,
    "search": _search,
    "certify": _certify,
    "export": _export,
    "inline": _copy("inline", "tars", lambda case: case.job.shards),
    "arrange": _arrange,
    "scatter": _scatter,
    "cluster": _copy("cluster", "tars", lambda case: math.ceil(case.job.samples / case.recipe.export.shard_size)),
}
