"""The store's lock, held and wanted by real processes in folders, and where a file system can do less.

The commands themselves, and an S3 server: tests/e2e/test_lock_verbs.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from graphbuild.errors import ConfigError, StageError
from graphbuild.store import lock
from graphbuild.store.lock import LOCK, writing
from graphbuild.store.store import Store, json_text

ELSEWHERE = {"host": "far", "process": 1, "started": "1", "system": "another boot pid:[1]", "verb": "embed"}
ELSEWHERE |= {"since": "2026-01-01 00:00:00 UTC", "token": "0" * 32, "renewed": 7}
needs_proc = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="processes are told by /proc")

# Says "ready"; for each line that it is told tries to hold the lock and says "held", or how it was refused; holds it
# until it is told one more.
HOLD = """
import sys
from graphbuild.errors import ConfigError, StageError
from graphbuild.store.lock import writing
from graphbuild.store.store import Store

print("ready", flush=True)
for line in sys.stdin:
    try:
        with writing(Store(sys.argv[1]), sys.argv[2]):
            print("held", flush=True)
            sys.stdin.readline()
        print("ended", flush=True)
    except (ConfigError, StageError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)
"""


class Other:
    """Another process that holds, or wants, the lock of a store."""

    def __init__(self, url: str, verb: str = "index", code: str = HOLD, env: Mapping[str, str] | None = None) -> None:
        command, pipe = [sys.executable, "-c", code, url, verb], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **(env or {})})
        assert self.says() == "ready"

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def holds(self) -> bool:
        self.tell()
        return self.says() == "held"

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        self.process.wait()


def race(others: list[Other]) -> int:
    """Tell all at once; how many hold the lock then. They give it back when all have said something."""
    for other in others:
        other.tell()
    said = [other.says() for other in others]
    winners = [number for number, words in enumerate(said) if words == "held"]
    for words in said:
        assert words == "held" or f"`graphbuild racer-{winners[0]}`" in words, said
    for number in winners:
        others[number].tell()
        assert others[number].says() == "ended"
    return len(winners)


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        other.process.kill()
        other.process.communicate()


def left(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def write_lock(folder: Path, said: dict[str, Any], seconds_ago: float) -> Path:
    path = folder / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_text(said))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def test_the_second_is_refused_at_once_and_told_who_holds_the_lock(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(str(tmp_path), "export"))
    assert others[0].holds()
    begin = time.monotonic()
    with pytest.raises(ConfigError) as caught, writing(Store(str(tmp_path)), "index"):
        pass
    assert time.monotonic() - begin < 1
    for part in (str(tmp_path), "`graphbuild export`", f"process {others[0].process.pid} on {os.uname().nodename}"):
        assert part in caught.value.cause
    assert f"since {time.strftime('%Y-')}" in caught.value.cause
    assert f"kill {others[0].process.pid}" in caught.value.fix
    others[0].tell()
    assert others[0].says() == "ended"
    with writing(Store(str(tmp_path)), "index"):
        pass


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_behind(error: type[BaseException] | None, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    with pytest.raises(error) if error else contextlib.nullcontext(), writing(Store(str(folder)), "index"):
        assert left(folder) == ["_state", LOCK]
        if error:
            raise error
    assert left(tmp_path) == []


def test_a_verb_inside_a_verb_has_the_lock_and_gives_it_back_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with writing(store, "demo"):
        with writing(Store(f"{tmp_path}/"), "run"):
            pass
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_another_thread_of_the_same_process_is_another_command(tmp_path: Path) -> None:
    refused = []

    def want() -> None:
        try:
            with writing(Store(str(tmp_path)), "export"):
                pass
        except ConfigError as error:
            refused.append(error.cause)

    with writing(Store(str(tmp_path)), "index"):
        thread = threading.Thread(target=want)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert f"process {os.getpid()}" in refused[0]


@needs_proc
def test_a_killed_holder_is_followed_at_once(tmp_path: Path, others: list[Other]) -> None:
    for signal_ in (signal.SIGKILL, signal.SIGTERM):
        others.append(Other(str(tmp_path)))
        assert others[-1].holds()
        others[-1].kill(signal_)
        assert (tmp_path / LOCK).exists()
    with writing(Store(str(tmp_path)), "index"):
        pass
    assert not (tmp_path / LOCK).exists()


@needs_proc
def test_a_killed_holder_counts_as_dead_before_its_parent_asks_for_it_and_when_its_number_is_used_again(
    tmp_path: Path, others: list[Other]
) -> None:
    others.append(Other(str(tmp_path)))
    assert others[0].holds()
    said = json.loads((tmp_path / LOCK).read_bytes())
    others[0].process.kill()
    os.waitid(os.P_PID, others[0].process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with writing(Store(str(tmp_path)), "index"):
        pass
    write_lock(tmp_path, {**said, "process": os.getpid()}, 0)  # started at another time than this one
    with writing(Store(str(tmp_path)), "index"):
        pass


@needs_proc
def test_a_suspended_holder_on_this_machine_is_not_followed(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(str(tmp_path)))
    assert others[0].holds()
    others[0].process.send_signal(signal.SIGSTOP)
    write_lock(tmp_path, json.loads((tmp_path / LOCK).read_bytes()), 1e6)
    with pytest.raises(ConfigError), writing(Store(str(tmp_path)), "index"):
        pass


def test_another_hosts_lock_holds_while_it_is_renewed_and_no_longer(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    path = write_lock(tmp_path, ELSEWHERE, lock.STALE_SECONDS - 5)
    with pytest.raises(ConfigError) as caught, writing(store, "index"):
        pass
    assert "`graphbuild embed` (process 1 on far, since 2026-01-01 00:00:00 UTC)" in caught.value.cause
    assert "30 seconds after its last sign of life" in caught.value.fix
    assert caught.value.fix.endswith(f"rm {path}")
    assert json.loads(path.read_bytes()) == ELSEWHERE
    write_lock(tmp_path, ELSEWHERE, lock.STALE_SECONDS + 5)
    with writing(store, "index"):
        assert json.loads(path.read_bytes())["verb"] == "index"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"process": "x"}'])
def test_a_damaged_lock_ends_too(content: bytes, tmp_path: Path) -> None:
    path = write_lock(tmp_path, {}, 0)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"process .* on \?"), writing(Store(str(tmp_path)), "index"):
        pass
    os.utime(path, (0, 0))
    with writing(Store(str(tmp_path)), "index"):
        pass


@needs_proc
def test_one_that_was_killed_while_it_followed_another_is_followed_too(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(str(tmp_path)))
    assert others[0].holds()
    others[0].kill()
    seen = lock._FolderLock(Store(str(tmp_path)), "index").read()
    assert seen is not None
    claim = tmp_path / f"_state/.lock.json.{seen['tag']}.tmp"
    claim.write_bytes((tmp_path / LOCK).read_bytes())
    with writing(Store(str(tmp_path)), "index"):
        assert left(tmp_path) == ["_state", LOCK]


def test_a_lock_lives_longer_than_it_would_unrenewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_system", lambda: None)  # as on another host: the file alone tells
    with writing(Store(str(tmp_path)), "index"):
        refused = 0
        for _ in range(10):
            time.sleep(0.2)
            with pytest.raises(ConfigError):
                lock._FolderLock(Store(str(tmp_path)), "export").take()
            refused += 1
        assert refused == 10


@pytest.mark.parametrize("interrupts", ["come", "are ignored"])
def test_who_loses_its_lock_is_stopped_and_told_and_leaves_the_next_ones_alone(
    interrupts: str, tmp_path: Path, others: list[Other]
) -> None:
    code = HOLD.replace("sys.stdin.readline()", "time.sleep(seconds)")
    setting = "import signal, time, graphbuild.store.lock\ngraphbuild.store.lock.RENEW_SECONDS, seconds = 0.2, 60\n"
    if interrupts == "are ignored":  # as in a shell's background: the call that is running has to return
        setting = setting.replace("60", "2") + "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    others.append(Other(str(tmp_path), code=setting + code))
    assert others[0].holds()
    write_lock(tmp_path, ELSEWHERE, 0)
    begin = time.monotonic()
    said = others[0].says()
    assert time.monotonic() - begin < 10
    assert said.startswith("StageError ")
    assert "no longer this command's: `graphbuild embed` (process 1 on far" in said
    assert json.loads((tmp_path / LOCK).read_bytes()) == ELSEWHERE


def test_a_lock_that_was_removed_is_lost(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="it was removed"), writing(Store(str(tmp_path)), "index"):
        (tmp_path / LOCK).unlink()


def test_of_many_that_find_the_same_dead_lock_or_none_exactly_one_holds_it(tmp_path: Path, others: list[Other]) -> None:
    others += [Other(str(tmp_path), f"racer-{number}") for number in range(6)]
    for turn in range(30):
        if turn % 3:
            write_lock(tmp_path, ELSEWHERE, 1e6)
        assert race(others) == 1
        assert left(tmp_path) in ([], ["_state"])


def test_hundreds_of_times_there_are_never_two_though_each_looks_and_writes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six threads that want it all the time; every third holder leaves a lock as one killed on another host."""
    inside, most, taken = 0, 0, 0
    guard, rng, end = threading.Lock(), random.Random(0), time.monotonic() + 4
    read = lock._FolderLock.read

    def late(self: lock._FolderLock) -> dict[str, Any] | None:
        seen = read(self)
        time.sleep(rng.random() / 500)
        return seen

    monkeypatch.setattr(lock._FolderLock, "read", late)

    def want() -> None:
        nonlocal inside, most, taken
        while time.monotonic() < end:
            with contextlib.suppress(ConfigError, StageError), writing(Store(str(tmp_path)), "index"):
                with guard:
                    inside, taken = inside + 1, taken + 1
                    most = max(most, inside)
                time.sleep(0.002)
                with guard:
                    inside -= 1
                if taken % 3 == 0:
                    dead = tmp_path / f"_state/{taken}"
                    dead.write_bytes(json_text({**ELSEWHERE, "token": str(taken)}))
                    os.utime(dead, (0, 0))
                    dead.rename(tmp_path / LOCK)

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken > 100
    assert most == 1


def test_where_a_file_system_has_no_more_than_exclusive_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    store = Store("memory://locked")
    with writing(store, "index"):
        assert store.exists(LOCK)
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            lock._Lock(store, "export").take()
    assert not store.exists(LOCK)
    store.write_json(LOCK, ELSEWHERE)
    with pytest.raises(ConfigError, match="process 1 on far"), writing(store, "index"):
        pass
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.0)
    time.sleep(0.01)
    with writing(store, "index"):
        pass
    assert not store.exists(LOCK)


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write to the store"), writing(Store(f"{tmp_path}/file"), "index"):
        pass
