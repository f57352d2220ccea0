"""Integrity of a finished store: every file against its checksum, every file against the others, recall afresh.

Reads everything once (checksums: about 1 GB/s a core) and the tars' headers; changes nothing. Memory: THREADS shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from graphbuild.errors import ConfigError, GraphbuildError, StorageError
from graphbuild.export import clustered
from graphbuild.export.quantized import quantize_int8
from graphbuild.export.sidecar import Sidecar, text_columns
from graphbuild.graph import sketch
from graphbuild.graph.certify import certify_afresh, check_lists
from graphbuild.graph.select.selection import Selection, selection_of
from graphbuild.job.steps import STEPS
from graphbuild.look.checksums import Checked, check_files
from graphbuild.machine.terminal import counted
from graphbuild.runner.stage import records
from graphbuild.sources.tars import TarSample, open_tar, tar_stem
from graphbuild.store.checksum import file_sha256
from graphbuild.store.files import is_there
from graphbuild.store.layout import BACKGROUND, NEIGHBORS, SAMPLES, SIDECAR, SIMILARITIES, SKETCH, TEXTS, VECTORS
from graphbuild.store.sharded import Array
from graphbuild.store.shards import Shard, node_count, present_shards, shards_of
from graphbuild.store.store import Json, Store

THREADS = 8  # shards at a time: most of it is waiting for files, and hashing
FRESH_SEED = 104_729  # another draw of nodes than the build's certificate


@dataclass
class Report(Checked):
    """What verify found: problems, a line each naming the file, and what was checked."""

    shards: int = 0
    recall: Json = field(default_factory=dict)
    missing_tars: int = 0

    def fix(self, store: Store) -> str:
        """What to do about the problems."""
        without = f"`graphbuild embed {store.url} --force` without it, then index and export"
        moved = f"if it was moved, `graphbuild relocate {store.url} SHARDS`"
        tar = f"restore the tar; {moved}; or {without}" if self.missing_tars else ""
        files = "rebuild the stages named above with --force, or restore the files"
        return "; ".join(filter(None, [tar, files if len(self.problems) > self.missing_tars else ""]))

    def summary(self) -> str:
        recall = (
            f"; recall@{self.recall['k']} {self.recall['recall']:.6f} on {self.recall['sampled_nodes']:,} nodes"
            if self.recall
            else ""
        )
        state = f"{len(self.problems)} problem(s)" if self.problems else "no problems"
        size = f"{counted(self.files, 'file')} ({self.bytes / 1e6:,.1f} MB)"
        return f"verify    {state}: {size}, {counted(self.shards, 'shard')}{recall}"


def verify_store(store: Store) -> Report:
    """Check whatever stages are finished. Raises only when the store cannot be read at all."""
    manifest = store.manifest()
    begun = [step for step in STEPS if step.finished(store)]
    if len(begun) > 1 and not store.exists("manifest.json"):  # of a first stage that is not finished there is none
        return Report(problems=["manifest.json: missing"])
    if not manifest.get("stages", True):
        raise ConfigError(
            f"{store.url} has nothing finished to verify",
            "run a stage first, for instance `graphbuild embed`",
        )
    report = Report(**vars(check_files(store, manifest)))
    if report.problems:  # what does not even match its checksum is not worth comparing further
        return report
    shards = present_shards(store, manifest) if {"assign", "vectors"} & manifest["stages"].keys() else ()
    report.shards = len(shards)
    selection = _selection(store, "export") if "export" in manifest["stages"] else None
    with ThreadPoolExecutor(THREADS) as threads:
        for missing, problems in threads.map(lambda shard: _checked_shard(store, manifest, shard, selection), shards):
            report.missing_tars += missing
            report.problems += problems
    if "cluster" in manifest["stages"]:
        report.problems += _check_clustered(store, manifest)
    if "certify" in manifest["stages"] and not report.problems:
        certified = manifest["recall"]
        report.recall = certify_afresh(store, certified["sampled_nodes"], FRESH_SEED)
        if report.recall["recall_95_high"] < certified["recall_95_low"]:
            report.problems.append(
                f"recall of a fresh sample is {report.recall['recall']}, certified was {certified['recall']}"
            )
    return report


def _checked_shard(store: Store, manifest: Json, shard: Shard, selection: Selection | None) -> tuple[bool, list[str]]:
    """Whether a shard's tar is missing, and its problems."""
    try:
        if shard.tar is not None and not is_there(store.resolve(shard.tar["url"])):
            return True, [f"{store.resolve(shard.tar['url'])}: missing (shard {shard.name})"]
        return False, list(_check_shard(store, manifest, shard, selection))
    except StorageError:  # which says nothing of the shard
        raise
    except GraphbuildError as error:
        tar = f" ({shard.tar['name']})" if shard.tar is not None else ""
        return False, [f"shard {shard.name}{tar}: {error.cause}"]


def _check_shard(store: Store, manifest: Json, shard: Shard, selection: Selection | None) -> list[str]:
    name, end = shard.name, shard.first_row + shard.samples
    sampled, texts, embedded = (path.format(name) for path in (SAMPLES, TEXTS, VECTORS))
    samples = store.table(sampled)
    problems = []
    if samples["row"].to_pylist() != list(range(shard.first_row, end)):
        problems.append(f"{sampled}: rows are not {shard.first_row} to {end - 1}")
    nodes = store.table(texts, ["node"])["node"].to_numpy()
    ids = np.arange(shard.first_node, shard.first_node + shard.nodes)
    if not np.array_equal(nodes, ids):
        problems.append(f"{texts}: nodes are not {ids[0]} to {ids[-1]}" if len(ids) else f"{texts}: not empty")
    if shard.tar is not None:
        problems += _check_tar(store, shard.name, shard.tar, samples)
    if {"encode", "vectors"} & manifest["stages"].keys():
        vectors = store.array(embedded)
        width = manifest["embeddings"]["d"] if len(vectors) else vectors.shape[-1]  # of none it may not be known
        if vectors.shape != (shard.nodes, width) or vectors.dtype != np.float16:
            problems.append(f"{embedded}: {vectors.dtype} {list(vectors.shape)}")
        elif len(ids) and not np.abs(np.linalg.norm(vectors.astype(np.float32), axis=1) - 1).max() <= 2e-3:
            problems.append(f"{embedded}: a vector is not of unit norm")
    if "certify" in manifest["stages"] and len(ids):
        problems += _check_graph(store, manifest, name, ids)
    if "export" in manifest["stages"] and not problems:
        problems += _check_sidecar(store, manifest, shard, samples if selection is None else selection.applied(samples))
    return problems


def _check_tar(store: Store, shard: str, tar: Json, samples: pa.Table) -> list[str]:
    with open_tar(store.resolve(tar["url"])) as opened:
        found = opened.samples()
        same = file_sha256(opened.source) == tar["sha256"]
    keys = [sample.key for sample in found]
    if keys != samples["key"].to_pylist():
        return [f"{tar['name']}: its {len(keys)} keys are not those of {SAMPLES.format(shard)} ({len(samples)})"]
    if not _are_members(samples["image_offset"].fill_null(-1).to_pylist(), found):
        return [f"{tar['name']}: images do not lie where {SAMPLES.format(shard)} says"]
    return [] if same else [f"{tar['name']}: its content has changed (sha256 differs)"]


def _are_members(offsets: list[int], samples: Sequence[TarSample]) -> bool:
    """Whether a member of each sample begins at its offset; -1: it has no place."""
    places = ({member.offset for member in sample.members} | {-1} for sample in samples)
    return all(offset in members for offset, members in zip(offsets, places, strict=True))


def _check_graph(store: Store, manifest: Json, name: str, ids: Array) -> list[str]:
    k = manifest["graph"]["k"]
    paths = [path.format(name) for path in (NEIGHBORS, SIMILARITIES, BACKGROUND, SKETCH)]
    neighbors, similarities, background, sketches = map(store.array, paths)
    problems = []
    if neighbors.shape != (len(ids), k) or similarities.shape != (len(ids), k) or background.shape != (len(ids), 2):
        return [
            f"graph/{name}.*.npy: {neighbors.shape}, {similarities.shape}, {background.shape}, not [{len(ids)}, {k}]"
        ]
    check_lists(ids, neighbors.astype(np.int64), node_count(manifest))
    if (np.diff(similarities.astype(np.float32), axis=1) > 0).any() or not np.isfinite(similarities).all():
        problems.append(f"{paths[1]}: a row is not in descending order")
    if sketches.shape != (len(ids), min(manifest["embeddings"]["d"], sketch.BYTES)):
        problems.append(f"{paths[3]}: {sketches.shape}, not one of {sketch.BYTES} bytes a node")
    if not np.isfinite(background).all():
        problems.append(f"{paths[2]}: not finite")
    return problems


def _check_sidecar(store: Store, manifest: Json, shard: Shard, samples: pa.Table) -> list[str]:
    name = shard.name if shard.tar is None else tar_stem(shard.tar["name"])
    path = SIDECAR.format(name)
    sidecar = Sidecar.read(store.display(path))
    if sidecar.header.graph != manifest["graph"]["fingerprint"]:
        return [f"{path}: written from another graph"]
    node = text_columns(samples)[0]["node"].fill_null(-1).to_numpy()
    for column, written in (("key", samples["key"].to_numpy()), ("row", samples["row"].to_numpy()), ("node", node)):
        if not np.array_equal(getattr(sidecar, column), written):
            return [f"{path}: column {column} differs from {SAMPLES.format(shard.name)}"]
    own = np.flatnonzero((node >= shard.first_node) & (node < shard.first_node + shard.nodes))
    at = node[own] - shard.first_node
    problems = []
    for column, of in (("neighbors", NEIGHBORS), ("embedding", VECTORS), ("sketch", SKETCH)) if len(own) else ():
        carried, expected = getattr(sidecar, column), store.array(of.format(shard.name))[at]
        if column == "embedding" and sidecar.header.embeddings == "int8":
            expected = quantize_int8(expected)[0]
        if carried is not None and not np.array_equal(carried[own], expected):
            problems.append(f"{path}: column {column} differs from {of.format(shard.name)}")
    return problems


def _selection(store: Store, stage: str) -> Selection | None:
    """The selection that a layout was exported with."""
    record = next(iter(records(store, stage).values()))
    return selection_of(store, record["settings"].get("selection"))


def _check_clustered(store: Store, manifest: Json) -> list[str]:
    """The tars in neighbour order: each beside its sidecar, and every row of the store in one of them."""
    problems = []
    written = np.zeros(int(shards_of(store, manifest).column("samples").sum()), np.int64)
    for name in records(store, "cluster"):
        path = f"{clustered.FOLDER}/{name}"
        sidecar = Sidecar.read(store.display(f"{path}.graph.parquet"))
        with open_tar(store.display(f"{path}.tar")) as opened:
            found = opened.samples()
        same_keys = [sample.key for sample in found] == sidecar.key.tolist()
        if not same_keys or not _are_members(sidecar.image_offset.tolist(), found):
            problems.append(f"{path}.tar: its keys or the places of its images are not those of its sidecar")
        if sidecar.header.graph != manifest["graph"]["fingerprint"]:
            problems.append(f"{path}.graph.parquet: written from another graph")
        written += np.bincount(sidecar.row, minlength=len(written))
    selection = _selection(store, "cluster")
    wanted = np.ones(len(written), int) if selection is None else selection.keeps(np.arange(len(written)))
    if (written != wanted).any():
        row = int((written != wanted).argmax())
        problems.append(f"{clustered.FOLDER}/: row {row} is in {written[row]} tars, not in {int(wanted[row])}")
    return problems
