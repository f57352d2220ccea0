"""Stages and tasks: a stage is two pure functions on files, `plan` and `run`; a task is one unit of resume.

A task's fingerprint covers the settings that decide its bytes and the identity of its inputs. Its record in
`_state/<stage>/<task>.done.json`, written after its files, lets a rerun skip it, or say what has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphbuild.runner import partly
from graphbuild.store.layout import MANIFEST, STATE, by_number
from graphbuild.store.store import FORMAT_VERSION, Json, Store, Writer

if TYPE_CHECKING:
    from graphbuild.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of work and of resume.

    settings: JSON values, chosen by the user, that decide the output's bytes. inputs: name -> identity (size and date)
    of what is read from outside the store. built: what is read of the store's own earlier stages, by digest, and what
    follows from them. hints: what does not change the result (device, threads) or what the others already cover. frees:
    folders of scratch that go once no task is left to do that names them.

    Changed settings or inputs need the user's word (--force); changed `built` only follows from such a change. A file
    that is added behind others of its kind ("captions 2" behind "captions") is no change.
    """

    stage: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    built: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    frees: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage, self.name, self.settings, self.inputs, self.built)

    @property
    def title(self) -> str:
        """The task to people, who know its file better than its number."""
        return titled(self.name, self.inputs)

    def changes(self, done: Json) -> list[str]:
        """What of settings and inputs differs from the run recorded in `done`, a readable line each."""
        lines = []
        for kind, now in (("settings", self.settings), ("inputs", self.inputs)):
            before = done[kind]
            for key in sorted({*before, *now}):
                old, new = before.get(key, "not set"), json.loads(json.dumps(now.get(key, "not set")))
                is_added = key not in before and key.rpartition(" ")[0] in before  # "captions 2"
                if old != new and not (kind == "inputs" and (is_added or same_input(old, new))):
                    lines.append(f"{key}: {_short(old)} -> {_short(new)}")
        return lines


logger = logging.getLogger(__name__)
KEPT = 250_000  # records in memory, beside those that are in use: about a gigabyte
MANY = 1_000  # records of a stage that are also kept in one file
TOGETHER = f"{STATE}/all.records"
_kept: dict[tuple[str, str, str], dict[str, tuple[tuple[int, object], Json]]] = {}  # by store, stage and state
Run = Callable[[Task, Store, Writer], Json]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The work of a step of the job (graphbuild.job.steps). It knows nothing of parallelism; that is the runner's.

    plan lists the tasks, reading only small files. run does one and returns its facts: JSON, its integer `counts` are
    summed over the tasks, or as the stage's own `counts` says. finish turns the records of all tasks into the
    `entries`, top-level keys of manifest.json; whole: whether a file that it wrote beside is still there, or else it is
    run again. check: refuses settings before any step of the verb runs. scratch: its files serve later steps of the
    verb alone; a crash of the machine may lose them, and they go when those steps are done. note: a line to show before
    its first task: what was chosen, and what it will take. keeps: of the record of a finished task whose input is gone,
    whether what it made stays, for others have numbers that follow from it: with --force it then has the state `gone`.
    on_device: a GPU serves it, if there is one. sharing: workers to a GPU: one computes while another reads, prepares
    or writes. in_process: whether these tasks may run without workers where the job is small: not where many would do
    them sooner. may_crash: without workers such a task has a process beside the command's (child.py). grows: its plan
    goes on from what its tasks have found, and is asked again when they are done, until it names no other. frees: its
    tasks free scratch before it ends.
    """

    name: str
    title: str
    plan: Callable[[Recipe, Store], list[Task]]
    run: Run
    finish: Callable[[Recipe, Store, list[Json]], Json] = lambda recipe, store, records: {}
    entries: tuple[str, ...] = ()
    whole: Callable[[Store, Json], bool] = lambda store, manifest: True
    counts: Callable[[Store, Sequence[Json]], dict[str, int]] = lambda store, records: total_counts(records)
    check: Callable[[Recipe], object] = lambda recipe: None
    scratch: bool = False
    keeps: Callable[[Json], bool] = lambda record: False
    on_device: bool = False
    sharing: int = 1
    in_process: Callable[[Sequence[Task]], bool] = lambda tasks: True
    may_crash: Callable[[Task], bool] = lambda task: False
    grows: bool = False
    frees: bool = False
    note: Callable[[Recipe, Store], str] | None = None


def perform(stage: Stage, task: Task, store: Store) -> Json:
    """Run one task and record it as done; returns the record. Nothing is recorded when it raises."""
    begin = time.perf_counter()
    record = state_path(stage.name, task.name)
    store.remove(record)  # its files are about to be replaced
    partly.begin(task.hints.get("told"))
    try:
        with Writer(store) as writer:
            facts = stage.run(task, store, writer)
    finally:
        partly.begin()
    done = sealed(
        {
            "task": task.name,
            "fingerprint": task.fingerprint,
            "settings": dict(task.settings),
            "inputs": dict(task.inputs),
            "built": dict(task.built),
            "outputs": writer.outputs,
            "facts": facts,
            "seconds": round(time.perf_counter() - begin, 3),
        }
    )
    store.write_json(record, done, durable=not stage.scratch)
    for state in ("failed", "gone"):
        store.remove(state_path(stage.name, task.name, state))
    return done


def state_path(stage: str, task: str, state: str = "done") -> str:
    return f"{STATE.format(stage)}/{task}.{state}.json"


def records(store: Store, stage: str, state: str = "done") -> dict[str, Json]:
    """Task name -> record, of all tasks of a stage in that state, in order of number (`by_number`).

    A file is read again when its listing tells another size or `version`: plans ask for the same ones many times. At
    most KEPT records are kept, of the stages that were asked for last; nobody changes one. Of many that are not, those
    of a finished stage come from one file (`write_together`).
    """
    suffix, every = f".{state}.json", store.listed(STATE.format(stage))
    listed = {name: told for name, told in every.items() if name.endswith(suffix)}
    before = _kept.pop((store.url, stage, state), {})
    if TOGETHER.format(stage) in every and len(listed) - len(before) >= MANY:
        before = _read_together(store, stage) | before
    kept = {name: before[name] for name, told in listed.items() if name in before and before[name][0] == told}
    new = {name: told[0] for name, told in listed.items() if name not in kept}
    shared: dict[str, Json] = {}  # settings are most often those of all tasks: each once in memory
    for name, record in zip(new, store.read_jsons(new), strict=True):
        if record is None:
            logger.warning("%s is damaged; its task counts as not done", store.display(name))
        else:
            if "settings" in record:
                record["settings"] = shared.setdefault(json.dumps(record["settings"]), record["settings"])
            kept[name] = listed[name], record
    _kept[store.url, stage, state] = {name: one for name, one in kept.items() if one[0][1] is not None}
    while sum(map(len, _kept.values())) > KEPT:
        _kept.pop(next(iter(_kept)))
    return {name.rsplit("/", 1)[-1].removesuffix(suffix): kept[name][1] for name in sorted(kept, key=by_number)}


def write_together(store: Store, stage: str, done: Mapping[str, Json]) -> None:
    """Write the records of a finished stage, where they are MANY, into one file too, with what their listing tells: one
    request to an object store, in place of one a record, for each command and each later stage that reads them."""
    if len(done) < MANY:
        return
    listed = store.listed(STATE.format(stage))
    named = ((state_path(stage, name), record) for name, record in done.items())
    told = ([name, *listed.get(name, (0, None)), record] for name, record in named)
    body = f"[{','.join(json.dumps(one) for one in told if one[2] is not None)}]".encode()
    sha256 = hashlib.sha256(body).hexdigest().encode()
    store.write_bytes(TOGETHER.format(stage), b"\n".join([sha256, body]), durable=False)


def _read_together(store: Store, stage: str) -> dict[str, tuple[tuple[int, object], Json]]:
    """Path -> what was listed of it, and the record; none where the file is damaged."""
    sha256, _, body = store.read_bytes(TOGETHER.format(stage)).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != sha256:
        return {}
    return {
        name: ((size, tuple(version) if isinstance(version, list) else version), record)
        for name, size, version, record in json.loads(body)
    }


def finished_tasks(store: Store, stage: str) -> Callable[[Task], bool]:
    """Tells whether a task of a stage that `grows` is done as it is planned now, and its files are there."""
    done = records(store, stage)
    places = {output["path"].rpartition("/")[0] for record in done.values() for output in record["outputs"]}
    files = {path: size for folder in places for path, size in store.sizes(folder).items()}

    def finished(task: Task) -> bool:
        record = done.get(task.name, {"fingerprint": None, "outputs": ()})
        there = (files.get(output["path"]) == output["bytes"] for output in record["outputs"])
        return record["fingerprint"] == task.fingerprint and all(there)

    return finished


def outputs(records: Sequence[Json], prefix: str = "", suffix: str = "") -> dict[str, str]:
    """Path -> sha256 of the files that those tasks wrote under `prefix` with that `suffix`, in order of number."""
    found = {o["path"]: o["sha256"] for record in records for o in record["outputs"]}
    wanted = [path for path in found if path.startswith(prefix) and path.endswith(suffix)]
    return {path: found[path] for path in sorted(wanted, key=by_number)}


def titled(task: str, inputs: Mapping[str, str]) -> str:
    """A task's name and the files that it reads from outside: "00005 (b.tar)"."""
    files = ", ".join(map(named_file, inputs.values()))
    return f"{task} ({files})" if files else task


def named_file(identity: str) -> str:
    """The file of an identity, which is its name, size and date."""
    return identity.rsplit(", ", 2)[0]


def fingerprint(stage: str, task: str, settings: Any, inputs: Any, built: Any) -> str:
    """sha256 over all that decides a task's files, and the format version."""
    return digest([FORMAT_VERSION, stage, task, settings, inputs, built])


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form; ValueError where it holds NaN or infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def summed(done: Iterable[Json], fact: str) -> Counter[str]:
    """A fact that holds numbers by name, such as counts or reasons, over all these tasks."""
    total: Counter[str] = Counter()
    for record in done:
        total.update(record["facts"].get(fact, {}))
    return total


def total_counts(done: Iterable[Json]) -> dict[str, int]:
    return dict(sorted(summed(done, "counts").items()))


def sealed(record: Mapping[str, Any]) -> Json:
    """A record with its checksum: the digest of all else in it but `seconds`, in which no two runs agree."""
    rest = {key: value for key, value in record.items() if key not in ("checksum", "seconds")}
    return {**record, "checksum": digest(json.loads(json.dumps(rest)))}


def write_manifest(store: Store, manifest: Mapping[str, Any]) -> None:
    store.write_json(MANIFEST, sealed(manifest))


def same_input(old: object, new: object) -> bool:
    """Whether an input is the one recorded, perhaps with a date now that nothing told then, as HTTP's did not once."""
    before = str(old)
    return old == new or (before.endswith(", None") and str(new).startswith(before.removesuffix("None")))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "not set" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
