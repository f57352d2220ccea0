"""The files and records that the model's tasks leave: real names and sizes, and no content (a hole).

Records have all that `perform` writes into them. sha256 of files are made up, and differ from file to file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from graphbuild.graph.certify import DRAWN, DRAWN_PARTS
from graphbuild.graph.codes import member_rows
from graphbuild.job.plan.case import Case
from graphbuild.knn.leaders import SORTED_PARTS, ranges_of_leaders
from graphbuild.runner.stage import Task, digest, state_path
from graphbuild.store.store import Json, Store, Writer

HEADER = 128  # bytes of a .npy
FAN = 10  # leaders of a node


class Shapes:
    """The files and facts of each stage's tasks, by the formats (docs/reference/format.md)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows = case.job.samples // case.job.shards
        self.folders: set[str] = set()
        self.random = np.random.default_rng(1)

    def perform(self, task: Task, store: Store) -> Json:
        """As runner.stage.perform, without what makes a file safe: temporary names, locks and flushing."""
        made, facts = getattr(self, f"_{task.stage}")(task, store)
        outputs = [{"path": path, "bytes": size, "sha256": _made_up(path)} for path, size in made.items()]
        record = {
            "task": task.name,
            "fingerprint": task.fingerprint,
            "settings": dict(task.settings),
            "inputs": dict(task.inputs),
            "built": dict(task.built),
            "outputs": outputs,
            "facts": facts,
        }
        record |= {"checksum": digest(record), "seconds": 1.234}
        for path, size in made.items():
            if self.holes or not path.startswith("_work") or task.stage == "prepare":  # whose plan looks for them
                self._write(store.path(path), size)
        self._write(store.path(state_path(task.stage, task.name)), 0, json.dumps(record).encode())
        return record

    holes = True  # of scratch too: nobody lists it, unless a command goes on in the midst of what it serves

    def _write(self, path: str, size: int, content: bytes = b"") -> None:
        folder = path.rpartition("/")[0]
        if folder not in self.folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.folders.add(folder)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        if content:
            os.write(descriptor, content)
        elif os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        os.close(descriptor)

    def _array(self, width: float, rows: int | None = None) -> int:
        return HEADER + round((self.rows if rows is None else rows) * width)

    def _scan(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        tar = {"url": task.hints["url"], "name": Path(task.hints["url"]).name}
        tar |= {"bytes": round(job.tar_bytes / job.shards), "sha256": _made_up(task.hints["url"])}
        counts = {"samples": self.rows, "captions": self.rows, "rejected": 0, "without_image": 0}
        told = {
            "counts": counts,
            "numbers": 0,
            "reasons": {},
            "shards": {task.name: {"samples": self.rows, "tar": tar}},
        }
        return {f"_state/scan/{task.name}.parquet": round(self.rows * (job.characters * 1.2 + 40))}, told

    def _split(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        shards = {Path(path).stem: [self.rows, self.rows] for path in task.hints["scans"]}
        rows, parts = len(shards) * self.rows, task.hints["parts"]
        sizes = [rows // parts + (part < rows % parts) for part in range(parts)]
        folder = "_work_number/split"
        made = {f"{folder}/{task.name}.firsts.npy": 8, f"{folder}/{task.name}.npy": 32}
        return {path: self._array(width, rows) for path, width in made.items()}, {"shards": shards, "sizes": sizes}

    def _unique(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        rows = sum(end - begin for begin, end in task.hints["ranges"])
        return {f"_work_number/unique/{task.name}.npy": self._array(16, rows)}, {}

    def _mark(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        rows = sum(end - begin for begin, end in task.hints["ranges"])
        made = {"firsts": 8.0, "counts": 8.0, "bits": 1 / 8}
        return {f"_work_number/mark/{task.name}.{w}.npy": self._array(size, rows) for w, size in made.items()}, {}

    def _number(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        first, names = task.hints.get("before", [0, 0])[0], [Path(p).stem for p in task.built if p != "groups"]
        rows = len(names) * self.rows
        of = "" if task.name == "all" else f"{task.name}."
        shards = {
            name: {
                "first_row": first + place * self.rows,
                "samples": self.rows,
                "first_node": first + place * self.rows,
                "nodes": self.rows,
                "sha256": _made_up(name),
            }
            for place, name in enumerate(names)
        }
        told = {"counts": {"samples": rows, "nodes": rows}, "shards": shards, "first_text": first, "first_node": first}
        return {f"_state/number/{of}{what}.npy": self._array(8, rows) for what in ("nodes", "counts")}, told

    def _texts(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        return {}, {"counts": {"texts": self.rows}, "texts_sha256": _made_up(f"texts {task.name}")}

    def _encode(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        tokens = round(self.rows * job.tokens)
        counts = {"embeddings": self.rows, "truncated": 0, "tokens": tokens, "computed_tokens": tokens}
        facts = {"counts": counts, "d": job.d, "precision": "float32", "max_tokens": 256, "static": False}
        return {f"nodes/{task.name}.npy": self._array(2 * job.d)}, facts

    def _assign(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        made = {f"samples/{task.name}.parquet": job.characters + 90, f"nodes/{task.name}.parquet": job.characters * 0.6}
        facts = {"counts": {"samples": self.rows, "nodes": self.rows}, "texts_sha256": _made_up(f"texts {task.name}")}
        return {path: round(self.rows * width) for path, width in made.items()}, facts

    def _fidelity(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        return {}, {"texts": 512, "mean_cosine": 0.9999, "min_cosine": 0.999}

    def _prepare(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job, folder = self.case.job, "_work/leaders"
        leaders = -(-job.nodes // 64)
        if task.name == "all":
            groups = -(-leaders // 128)
            made = {f"{folder}/codes.npy": self._array(job.d, leaders), f"{folder}/scales.npy": self._array(8, leaders)}
            made |= {f"{folder}/group_codes.npy": self._array(job.d, groups)}
            made |= {f"{folder}/group_scales.npy": self._array(8, groups), "_work/leader_nodes.npy": 8 * leaders}
            return made | {"_work/fan.npy": HEADER + 8}, {"leaders": leaders, "fan": FAN, "promised_recall": 0.951}
        some = round(leaders * (task.built["shards"][1] - task.built["shards"][0]) / job.shards)
        made = {"drawn": self._array(2 * job.d, some), "similarities": self._array(job.k * 4, 400)}
        made["ids"] = self._array(job.k * 8, 400)
        return {f"{folder}/{task.name}.{what}.npy": size for what, size in made.items()}, {}

    def _codes(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        d, names = self.case.job.d, task.built["nodes"]
        rows, ranges = sum(names.values()), len(ranges_of_leaders(self.case.job.nodes))
        files = {f"_work/moments/{task.name}.npy": HEADER + 8 * d * (d + 1)}
        part = rows * member_rows(FAN, d).itemsize // SORTED_PARTS
        files |= {f"_work/sorted/{number}/{task.name}.rows": part for number in range(SORTED_PARTS)}
        starts = [rows * at // (ranges - 1) for at in range(ranges)]
        return files, {"largest_rest": 0.04, "fan": FAN, "starts": starts}

    def _moments(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        d = self.case.job.d
        return {"_state/moments/moments.npy": HEADER + 8 * d * (d + 1), "graph/basis.npy": HEADER + 256 * d}, {}

    def _order(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        d, nodes = self.case.job.d, self.case.job.nodes
        if task.name == "all":
            made = {"ids": self._array(4, nodes), "places": self._array(4, nodes), "starts": self._array(8, 1_000)}
            return {f"_work/ordered/{what}.npy": size for what, size in made.items()}, {}
        widths = {"ids": 4, "vectors": 2 * d, "codes": d, "scales": 8, "leaves": 4 * FAN, "floors": 4}
        rows = round(nodes / (len(ranges_of_leaders(nodes)) - 1))
        made = {f"_work/ordered/{what}/{task.name}.npy": self._array(width, rows) for what, width in widths.items()}
        return made, {"counts": {"nodes": rows}}

    def _join(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job, cost = self.case.job, self.case.engine
        tasks = self.join_tasks
        rows = round(3 * job.nodes / tasks)
        made = {"ids": self._array(8, rows), "keys": self._array(8 * cost.length(job.k, job.nodes), rows)}
        return {f"_work/join/{task.name}.{what}.npy": size for what, size in made.items()}, {}

    join_tasks = 1

    def _merge(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        width = 8 * self.case.engine.length(job.k, job.nodes)
        return {f"_work/merged/{task.name}.npy": self._array(width, task.built["nodes"])}, {}

    def _refine(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        return {f"_work/refined/{task.name}.npy": self._array(8 * self.case.job.k, task.built["nodes"])}, {}

    def _search(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        k = self.case.job.k
        made = {"neighbors": 4 * k, "similarities": 2 * k, "background": 8, "sketch": 64}
        facts = {"counts": {"nodes": self.rows, "edges": self.rows * k}, "searched_again": 0}
        return {f"graph/{task.name}.{what}.npy": self._array(width) for what, width in made.items()}, facts

    def _certify(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        """Of each node drawn a share of the neighbours, as asked for, is missed, in a range at random."""
        job, (begin, end) = self.case.job, task.built["nodes"]
        count = end - begin
        if task.built["shards"] is None:
            scores = -np.sort(-self.random.uniform(0.5, 0.9, (count, job.k)), axis=1)
            widths = dict(zip(DRAWN_PARTS, (8, 2 * job.d, 4 * job.k, 8 * job.k), strict=True))
            writer = Writer(store)
            writer.array(DRAWN.format(task.name, "scores"), scores)
            made = {DRAWN.format(task.name, what): self._array(width, count) for what, width in widths.items()}
            return made, {}
        ranges = min(256, math.ceil(job.nodes / 2**18), job.shards)
        missed = self.random.poisson((1 - self.case.recipe.index.recall) * 0.8 * job.k / ranges, count)
        return {}, {"nearer": [[0.95] * int(number) for number in missed]}

    def _export(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        row = job.d + 4 + 6.0 * job.k + 40 + job.characters * 0.8
        name = Path(task.built["tar"]["name"]).stem
        return {f"shards/{name}.graph.parquet": round(self.rows * row)}, {
            "counts": {"samples": self.rows, "without_node": 0}
        }


def tars(folder: Path, count: int, size: int) -> None:
    """Tars of that size without content, for plans to list."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:06d}.tar"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size)


def _made_up(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()
