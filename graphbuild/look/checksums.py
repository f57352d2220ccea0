"""Is every file of a store the one that was written?

A record in `_state/` holds size and sha256 of the files that its task wrote, and a checksum of itself; the manifest one
of itself, and for each stage a fingerprint of its records; recipe.yaml one of its lines. What follows from these
(sizes.json) is compared. Reads every file once, about 1 GB/s a core; changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from graphbuild.errors import ConfigError, GraphbuildError
from graphbuild.export import clustered, inline, sidecars
from graphbuild.graph.lists import derived
from graphbuild.job.steps import STEPS, Step
from graphbuild.nodes import number, vectors
from graphbuild.recipe import resolve
from graphbuild.runner.stage import fingerprint, outputs, sealed, state_path
from graphbuild.runner.state import are_finished, sealed_text
from graphbuild.store.checksum import stream_sha256
from graphbuild.store.layout import SCANNED, STATE, shard_name
from graphbuild.store.remote import READERS, reaching
from graphbuild.store.shards import Shard, shards_of
from graphbuild.store.store import Json, Store, json_text

CHANGED = "its content has changed"


@dataclass
class Checked:
    """What was found: problems, a line each that begins with a file's name, and what was read."""

    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def check_files(store: Store, manifest: Json) -> Checked:
    """Every file against its checksum; only the manifest, when that is not as it was written."""
    problem, _ = _sealed_json(store, "manifest.json")
    if problem:
        return Checked(problems=[problem])
    checked = Checked(problems=list(_recipe(store, manifest)))
    shards = _table(store, manifest, checked)
    done = {step.name: _records(store, step, manifest, checked) for step in STEPS}
    checked.problems += _texts(done)
    if not checked.problems:
        checked.problems += _shards(manifest, shards, done)
        present = [shard for shard in shards if shard.name not in manifest.get("gone", [])]
        checked.problems += _sizes(store, manifest, present, done)
        for folder, stage in derived.STAGES.items():
            checked.problems += _lists(store, folder, stage.name, done[stage.name])
    return checked


def _sealed_json(store: Store, path: str) -> tuple[str, Json]:
    """What is wrong with a JSON file that holds its own checksum ("" if nothing is), and its content."""
    content = store.read_bytes(path)
    try:
        value = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return f"{path}: not a whole record", {}
    if not isinstance(value, dict) or "checksum" not in value:
        return f"{path}: it has no checksum", {}
    if value != sealed(value):
        return f"{path}: {CHANGED} (checksum differs)", {}
    return "" if json_text(value) == content else f"{path}: {CHANGED} (not as graphbuild writes JSON)", value


def _refuse(constant: str) -> None:
    """What json.loads calls for NaN and infinities, which JSON has not."""
    raise ValueError(constant)


def _table(store: Store, manifest: Json, checked: Checked) -> list[Shard]:
    """The shards of finished samples, where the file that tells them is sound."""
    if not {"assign", "vectors"} & manifest["stages"].keys():
        return []
    entry = manifest["shards"]
    problem = _file(store, entry, "manifest.json") if isinstance(entry, dict) else None
    if problem:
        checked.problems.append(problem)
        return []
    return list(shards_of(store, manifest))


def _shards(manifest: Json, shards: list[Shard], done: dict[str, dict[str, Json]]) -> Iterator[str]:
    """Whether the records tell the same shards."""
    if "vectors" in manifest["stages"]:
        told = vectors.vector_shards(done["vectors"].values())
    elif "assign" in manifest["stages"]:
        told = number.assigned_shards(done["assign"].values(), done["scan"].values())
    else:
        return
    if shards != told:
        named = "manifest.json" if isinstance(manifest["shards"], list) else manifest["shards"]["path"]
        yield f"{named}: not the shards that the records in _state/ tell"


def _texts(done: dict[str, dict[str, Json]]) -> Iterator[str]:
    """The records of stage texts, which has no files by which to tell, against those that they follow from."""
    numbered = {name: shard for record in done["number"].values() for name, shard in record["facts"]["shards"].items()}
    scanned = outputs(list(done["scan"].values()), "_state/scan/")
    for name, record in done["texts"].items():
        told = {**numbered.get(name, {}), "scan": scanned.get(SCANNED.format(name))}
        if name in numbered and told["scan"] and record["built"] != told:
            yield f"{state_path('texts', name)}: of other captions than _state/scan/ and _state/number/ tell"


def _recipe(store: Store, manifest: Json) -> Iterator[str]:
    try:
        content = store.read_bytes("recipe.yaml")
    except FileNotFoundError:
        yield "recipe.yaml: missing"
        return
    try:
        resolve(store, "embed", {})
    except ConfigError as error:
        yield f"recipe.yaml: {error.cause}"
    else:
        lines = content.splitlines(keepends=True)
        if sealed_text(b"".join(lines[:-1])) != content:
            yield f"recipe.yaml: {CHANGED} (sha256 differs); was it edited? the next command writes it again"
        elif manifest.get("recipe") not in (None, hashlib.sha256(content).hexdigest()):
            yield "recipe.yaml: not the one that manifest.json was made with"


def _records(store: Store, step: Step, manifest: Json, checked: Checked) -> dict[str, Json]:
    """The sound records of a step's finished tasks by their names, also of inputs that are gone; they and their files
    are checked."""
    stage, problems = step.name, []
    done: dict[str, Json] = {}
    gone: dict[str, Json] = {}
    paths = sorted(path for path in store.sizes(STATE.format(stage)) if path.endswith(".json"))
    with ThreadPoolExecutor(READERS) as threads:
        read = list(threads.map(lambda path: _sealed_json(store, path), paths))
    for path, (problem, record) in zip(paths, read, strict=True):
        task, state, _ = path.rsplit("/", 1)[-1].rsplit(".", 2)
        if not problem and state in ("done", "gone"):
            decided = (task, record["settings"], record["inputs"], record["built"])
            if fingerprint(stage, *decided) != record["fingerprint"]:
                problem = f"{path}: the record of another task ({record['task']})"
            (done if state == "done" else gone)[task] = record
        if problem:
            problems.append(problem)
    entry = manifest["stages"].get(stage)
    if entry is not None and not problems:
        problems += _completeness(stage, entry, done, manifest)
    every = gone | done
    named = [(output, state_path(stage, task)) for task, record in every.items() for output in record["outputs"]]
    with ThreadPoolExecutor(8 if store.is_local else READERS) as threads:  # hashing leaves the interpreter free
        problems += filter(None, threads.map(lambda pair: _file(store, *pair), named))
    checked.files += len(named)
    checked.bytes += sum(output["bytes"] for output, _ in named)
    checked.problems += problems
    return every


def _completeness(stage: str, entry: Json, done: dict[str, Json], manifest: Json) -> Iterator[str]:
    """Whether these are the records from which the manifest's entry of a stage was made."""
    graph = manifest.get("graph", {}).get("fingerprint")
    for task, record in done.items():
        if record["built"].get("graph", graph) != graph:
            yield f"{state_path(stage, task)}: of another graph than the manifest's"
    if len(done) != entry["tasks"]:
        names = [entry["task"]] if "task" in entry else map(shard_name, range(entry["tasks"]))
        missing = [f"{state_path(stage, task)}: missing" for task in names if task not in done]
        counted = f"{STATE.format(stage)}/: {len(done)} tasks recorded as done, the manifest says {entry['tasks']}"
        yield from missing if len(missing) == entry["tasks"] - len(done) else [counted]
        return
    if not are_finished(entry, done):
        named = state_path(stage, *done) if len(done) == 1 else state_path(stage, "*")
        yield f"manifest.json: its stage {stage} was made from other records than {named}"


def _file(store: Store, output: Json, record: str) -> str | None:
    path = output["path"]
    try:
        with reaching(store.display(path)):
            size = store.fs.size(store.path(path))
            if size != output["bytes"]:
                return f"{path}: {size:,} bytes, {output['bytes']:,} when it was written ({record})"
            with store.fs.open(store.path(path), "rb") as file:
                if output["sha256"] and stream_sha256(file) != output["sha256"]:
                    return f"{path}: {CHANGED} (sha256 differs from that in {record})"
    except FileNotFoundError:
        return f"{path}: missing ({record})"
    return None


def _sizes(store: Store, manifest: Json, shards: Sequence[Shard], done: dict[str, dict[str, Json]]) -> Iterator[str]:
    """Samples a tar, of every layout that is finished."""
    tars = sidecars.tar_sizes(shards)
    layouts = {
        "export": (sidecars.SIZES, tars),
        "inline": (inline.SIZES, inline.inline_sizes(shards, done["inline"].values()) if done["inline"] else None),
        "cluster": (clustered.SIZES, clustered.tar_sizes(list(done["cluster"].values()))),
    }
    for stage, (path, sizes) in layouts.items():
        if stage not in manifest["stages"] or sizes is None:
            continue
        try:
            if store.read_bytes(path) != json_text(sizes):
                yield f"{path}: not the samples a tar that the manifest says"
        except FileNotFoundError:
            yield f"{path}: missing"


def _lists(store: Store, folder: str, stage: str, done: dict[str, Json]) -> Iterator[str]:
    """Derived lists that have lost their record; other files in their folder are none of the store's."""
    for path in store.sizes(folder):
        task = path.rsplit("/", 1)[-1].removesuffix(".parquet")
        if path.endswith(".parquet") and task not in done:
            try:
                with store.fs.open(store.path(path), "rb") as file:
                    is_list = bool(derived.about(file))
            except (OSError, ValueError, GraphbuildError):
                continue
            if is_list:
                yield f"{state_path(stage, task)}: missing, though {path} is there"
