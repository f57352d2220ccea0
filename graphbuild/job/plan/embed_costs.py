"""Formulas of the stages from a list to embeddings: urls to vectors. Times of a GPU are computed, never measured."""

from __future__ import annotations

import math

from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.encoder_facts import MINILM
from graphbuild.nodes.encode import STAGE
from graphbuild.nodes.encoder.model import CPU_TOKENS, GPU_TOKENS
from graphbuild.nodes.fidelity import SAMPLE as FIDELITY_TEXTS

PADDING = 1.05  # rows that a packed batch computes beside the tokens it has (benchmarks/embed.py: 4.7%)
FETCH_SECONDS = 1.2  # of a URL, dead ones too: img2dataset's page on CC3M has 850/s with 16 x 64 requests in flight
ORIGINAL_BYTES = 290_000  # of a web image: the same page, at 2 Gbit/s
ACTIVATION_BYTES = 60  # moved a token, layer and hidden unit by the encoder: 30 bfloat16 numbers read or written
CHUNK_ROWS = 100_000  # of a list that are read at a time


def urls(case: Case) -> Cost:
    """The list, read once by one task; a chunk of it and a shard's rows in memory as Arrow."""
    job = case.job
    held = 3 * (CHUNK_ROWS + case.recipe.download.shard_size) * job.list_bytes / max(job.rows, 1)
    return Cost(1, job.rows * case.rates.list_row, job.list_bytes, job.list_bytes * 0.6, held)


def download(case: Case) -> Cost:
    """The slowest of three: requests in flight (threads x workers, FETCH_SECONDS each), cores (an image's decoding and
    scaling), and the link (ORIGINAL_BYTES an image). In memory: twice as many bodies as requests, an image decoded, and
    the shard's rows."""
    job, config, machine = case.job, case.recipe.download, case.machine
    rows = min(config.shard_size, job.rows)
    seconds = max(rows * FETCH_SECONDS / config.threads, rows * job.success * case.rates.image)
    network = job.samples * ORIGINAL_BYTES
    held = 2 * config.threads * ORIGINAL_BYTES + 60e6 + rows * 3_000
    tasks, written = math.ceil(job.rows / config.shard_size), job.tar_bytes + job.list_bytes * 0.8
    least_seconds = network / (machine.network * machine.nodes)
    return Cost(tasks, seconds, network, written, held, least_seconds=least_seconds)


def scan(case: Case) -> Cost:
    """Tars: their headers and captions, and one pass for the sha256. A list: one task reads and cuts it."""
    job, rates = case.job, case.rates
    written = job.samples * (job.characters * 1.2 + 40)
    if job.source == "captions":
        held = (CHUNK_ROWS + case.recipe.embed.shard_size) * (3 * job.characters + 300)
        return Cost(1, job.rows * rates.list_row, job.list_bytes, written, held)
    seconds = case.shard_rows * rates.tar_sample + job.tar_bytes / job.shards * rates.hash_byte
    return Cost(job.shards, seconds, job.tar_bytes, written, held=case.shard_rows * (3 * job.characters + 1_500))


def number(case: Case) -> Cost:
    """One task over the 128-bit hashes of all samples: 150 bytes each (graphbuild.nodes.number)."""
    job = case.job
    written = 8.0 * (job.samples + job.nodes)
    return Cost(1, job.samples * case.rates.number_row, 16.0 * job.samples, written, held=150.0 * job.samples)


def assign(case: Case) -> Cost:
    job = case.job
    read = job.samples * (job.characters * 1.2 + 40)
    written = job.samples * (job.characters + 40) + job.nodes * job.characters * 0.6
    held = case.shard_rows * (6 * job.characters + 600)
    return Cost(job.shards, case.shard_rows * case.rates.assign_row, read, written, held, 8.0 * job.samples)


def encode(case: Case) -> Cost:
    """Cores: tokenising, and the layers' products, by FLOP in units of MiniLM's.

    GPU: 2 FLOP a weight and token and 4 T h a token for attention at the bfloat16 peak, and ACTIVATION_BYTES moved at
    the memory's. Workers share it and tokenise, on its share of the cores, while it computes: only what takes longer
    than that costs time.
    """
    job, rates, machine, encoder = case.job, case.rates, case.machine, case.job.encoder
    texts, tokens = case.shard_nodes, case.shard_nodes * job.tokens * PADDING
    held = texts * (3 * job.characters + 110 * job.tokens + 10 * job.d)
    read, written = job.nodes * job.characters * 0.6, 2.0 * job.d * job.nodes
    if not encoder.layers:
        return Cost(job.shards, texts * rates.vector_row * case.width, read, written, held)
    card = machine.card if case.recipe.embed.device != "cpu" else None
    if card is None:
        tokens = max(tokens, math.ceil(texts * job.tokens / CPU_TOKENS) * CPU_TOKENS)
        seconds = texts * rates.text + tokens * rates.token * encoder.layers / MINILM.layers
        return Cost(job.shards, seconds, read, written, held)
    flop = 2 * encoder.layers + 4 * job.tokens * encoder.hidden * encoder.depth
    moved = ACTIVATION_BYTES * encoder.hidden * encoder.depth
    gpu_seconds = tokens * (flop / card.bfloat16 + moved / card.bytes_second)
    tokenising = texts * rates.text / max(machine.cores // machine.gpus, 1)
    vram = STAGE.sharing * (1.5 * encoder.bytes + GPU_TOKENS * encoder.hidden * 40.0 + 0.5e9)
    seconds = max(tokenising - gpu_seconds, 0.0)
    return Cost(job.shards, seconds, read, written, held, vram=vram, on_gpu=True, gpu_seconds=gpu_seconds)


def fidelity(case: Case) -> Cost:
    """FIDELITY_TEXTS texts once more by sentence-transformers in float32, in one task, on a core or a GPU's core."""
    texts = min(FIDELITY_TEXTS, math.ceil(case.job.nodes / 4))
    seconds = texts * case.rates.fidelity_text * case.job.encoder.layers / MINILM.layers
    on_gpu = bool(case.machine.card) and case.recipe.embed.device != "cpu"
    return Cost(1, 0.0 if on_gpu else seconds, on_gpu=on_gpu)


def vectors(case: Case) -> Cost:
    job = case.job
    seconds = case.shard_rows * case.rates.vector_row * case.width
    written = 2.0 * job.d * job.nodes + 30 * job.nodes
    return Cost(job.shards, seconds, job.list_bytes, written, held=case.shard_rows * job.d * 20.0)
