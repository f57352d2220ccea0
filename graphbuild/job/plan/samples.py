"""What the stages from a source to embeddings take: download, pack and embed (as formulas.py)."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.encoder_facts import MINILM
from graphbuild.nodes.distinct import GROUP, STORE_BYTES, TASK_BYTES
from graphbuild.nodes.encode import STAGE as ENCODE
from graphbuild.nodes.encoder.model import CPU_TOKENS, GPU_TOKENS
from graphbuild.nodes.fidelity import SAMPLE as FIDELITY_TEXTS
from graphbuild.nodes.keys import TABLE_ROWS
from graphbuild.recipe import BESIDE
from graphbuild.sources.parts import BATCH_BYTES
from graphbuild.sources.pieces import PIECE_BYTES

CHUNK_ROWS = 100_000  # of a list that are read at a time
LINES = re.compile(r"\.(parquet|jsonl|tsv)$", re.IGNORECASE)  # lists that are read in pieces
FETCH_SECONDS = 1.2  # of a URL, dead ones too: img2dataset's page on CC3M has 850/s with 16 x 64 requests in flight
ORIGINAL_BYTES = 290_000  # of a web image: the same page, at 2 Gbit/s
PADDING = 1.05  # rows that a packed batch computes beside the tokens it has (benchmarks/embed.py: 4.7%)
ACTIVATION_BYTES = 60  # moved a token, layer and hidden unit by the encoder: 30 bfloat16 numbers read or written


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
    # Which texts are new: a fifth of assign's time, as measured. Vectors beside tars have no texts to tell.
    new = Cost(job.shards, 0.2 * rows * rates.assign_row, scanned, 0.0, rows * (3 * job.characters + 100))
    return {
        "scan": scan,
        **_numbering(case),
        **({} if case.recipe.embed.source == BESIDE else {"texts": new}),
        "assign": Cost(job.shards, rows * rates.assign_row, scanned, texts, rows * (6 * job.characters + 600), hashes),
        "encode": _encode(case),
        # by sentence-transformers in float32, in one task, on a core or a GPU's core
        "fidelity": Cost(1, 0.0 if on_gpu else checked, on_gpu=on_gpu),
        "vectors": Cost(job.shards, rows * rates.vector_row * case.width, job.list_bytes, vectors, rows * job.d * 20.0),
    }


def _numbering(case: Case) -> dict[str, Cost]:
    """Over the 128-bit hashes of all captions: one task, or one a group and partition (graphbuild.nodes.distinct). The
    shares of the time are as measured."""
    if case.recipe.embed.source == BESIDE:
        return _joining(case)
    job, row = case.job, case.rates.number_row
    captions = max(job.samples, job.nodes)
    groups = math.ceil(captions / GROUP)
    size, bits, numbers = captions / groups, captions / 8, 8.0 * (captions + job.nodes)
    held = TASK_BYTES * size
    if groups == 1:
        return {"number": Cost(1, captions * row, 2 * numbers, numbers, held)}
    split, unique = 40.0 * captions, 16.0 * captions
    return {
        "split": Cost(groups, size * row, 16.0 * captions, split, held),
        "unique": Cost(groups, 0.7 * size * row, split, unique, held),
        "mark": Cost(groups, 0.1 * size * row, split + unique, numbers + bits, held),
        "number": Cost(
            groups, 0.07 * size * row, numbers + groups * bits, numbers, 0.7 * held + STORE_BYTES * captions
        ),
    }


def _joining(case: Case) -> dict[str, Cost]:
    """With vectors beside tars, as many as samples: over the keys of both, as over captions, in one task, or in groups
    before one task that writes what they tell, a group after the other. Joined otherwise, that task alone."""
    job, row, embed = case.job, case.rates.number_row, case.recipe.embed
    keys, numbers, records = 2 * job.samples, 24.0 * job.samples, 5_000.0 * job.shards
    if embed.vector_keys is None and embed.key_column is None:
        return {"number": Cost(1, 0.3 * job.samples * row, 0.0, numbers, records)}
    if keys <= GROUP:
        return {"number": Cost(1, 3.0 * keys * row, 2 * numbers, numbers, TASK_BYTES * keys + records)}
    groups = 2 * math.ceil(job.samples / GROUP)
    size, split, unique, places = keys / groups, 40.0 * keys, 16.0 * keys, 8.0 * job.samples
    held = TASK_BYTES * size
    return {
        "split": Cost(groups, 2.2 * size * row, 32.0 * keys, split, held),
        "unique": Cost(groups, 0.7 * size * row, split, unique, held),
        "mark": Cost(groups, 0.4 * size * row, split + unique, places, held),
        "number": Cost(1, 0.3 * job.samples * row, places, numbers, 8 * size + records + TABLE_ROWS * 300.0),
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
