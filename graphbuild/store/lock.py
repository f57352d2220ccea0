"""One command at a time writes a store: `writing` takes a lock file in it, or refuses at once and says who has it.

Who has died? Of a command in this boot and process namespace the system says whether that very process (number and
start) still runs: a killed one is followed at once, a suspended one never. Any other one has died when its file was not
renewed for STALE_SECONDS by the clock of the file system or server alone, so that machines' clocks need not agree.

Every change is a compare-and-swap, so of all who find the same dead lock one follows it. On S3 these are conditional
puts. In a folder, who creates the claim on what is there (O_EXCL, as NFS has it too) may replace it. Other file systems
create at most once, as far as fsspec's mode="create" holds, but overwrite a dead lock and read it back after a moment:
best effort, as on S3 servers that do not know the conditions.

Not promised: a command that stood still so long that another host followed it (a suspended laptop) learns it up to
RENEW_SECONDS after it wakes, and both write until then. It is interrupted; where SIGINT is ignored, or outside the main
thread, once its running call returns. Workers may outlive a killed command for a moment; they write whole files, the
same as its follower's. Costs a few small requests every RENEW_SECONDS. Reading verbs and loaders ask for no lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from graphbuild.errors import ConfigError, StageError, StorageError
from graphbuild.store.layout import LOCK
from graphbuild.store.leftovers import hold
from graphbuild.store.remote import S3, reaching
from graphbuild.store.store import Json, Store, json_text

RENEW_SECONDS = 5.0
NOTHING = "0" * 32  # the tag of no lock
STALE_SECONDS = 30.0  # a renewal may have to wait for a server that throttles
SETTLE_SECONDS = 1.0  # by then all who overwrite the same dead lock have done so
CONDITION_FAILED = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"}

logger = logging.getLogger(__name__)
_held: set[tuple[str, str, int]] = set()  # file system, path, thread: a verb inside a verb has the lock already


@contextlib.contextmanager
def writing(store: Store, verb: str) -> Iterator[None]:
    """Hold the store's lock; inside a `writing` of the same store and thread do nothing.

    Raises:
        ConfigError: another command writes the store, or it cannot be written. StageError: the lock was lost meanwhile.
    """
    key = (type(store.fs).__name__, store.path(LOCK), threading.get_ident())
    if key in _held:
        yield
        return
    folder = Path(store.path(LOCK)).parent
    made = [path for path in (folder, *folder.parents) if not path.exists()] if store.is_local else []
    lock = (_FolderLock if store.is_local else _S3Lock if store.url.startswith(S3) else _Lock)(store, verb)
    try:
        lock.take()
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            lock.end()
    finally:
        for path in made:  # left as it was where nothing was written
            with contextlib.suppress(OSError):
                path.rmdir()


class _Lock:
    """The lock of a store, by what any fsspec file system can do."""

    def __init__(self, store: Store, verb: str) -> None:
        self.store, self.fs, self.path = store, store.fs, store.path(LOCK)
        self.mine: Json = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}
        self.mine |= {"system": _system(), "verb": verb, "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
        self.mine |= {"token": uuid.uuid4().hex, "renewed": 0}
        self._holder = threading.current_thread()
        self._ending = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="graphbuild-lock", daemon=True)

    def take(self) -> None:
        """Raises ConfigError, which names the holder, where there is one that has not died."""
        try:
            with reaching(self.store.display(LOCK)):
                while not self._is_mine(seen := self.read()):
                    if seen is not None and not self._has_died(seen, self.path):
                        if self.read() == seen:  # and not of one that has just followed a dead one
                            raise self._refusal(seen)
                        continue
                    if not self.swap(seen):  # another one was quicker, or is at it
                        time.sleep(0.02)
                    elif seen is not None:
                        logger.info("%-9s %s has died; this command follows it", "lock", _name(seen))
        except OSError as error:
            raise self.store.unwritable(error) from error
        self._renewing.start()

    def end(self) -> None:
        """Give the lock back. Raises StageError when it was lost before."""
        self._ending.set()
        self._renewing.join(STALE_SECONDS)  # so long only where its server does not answer
        try:
            with reaching(self.store.display(LOCK)):
                for attempt in range(3):
                    seen = self.read()
                    if not self._is_mine(seen) and attempt == 0:
                        raise self._gone(seen)
                    if not self._is_mine(seen) or self.swap(seen, remove=True):
                        return
        except (StorageError, OSError) as error:
            logger.warning("%s stays there, as a dead command's (%s)", self.store.display(LOCK), error)

    def read(self) -> Json | None:
        """What the lock says, if there is one, and its `tag`, another one after every change."""
        try:
            content = self.fs.cat_file(self.path)
        except FileNotFoundError:
            return None
        return {**_parse(content), "tag": hashlib.sha256(content).hexdigest()[:32]}

    def swap(self, seen: Json | None, *, remove: bool = False) -> bool:
        """Write `mine` where it is still as seen, or remove that; False when another one was quicker."""
        if self.read() != seen:
            return False
        try:
            self.change(seen, remove=remove)
        except FileExistsError:  # or the answer was lost, and the second try refused
            return not remove and self._is_mine(self.read())
        return remove or self._is_mine(self.read())

    def change(self, seen: Json | None, *, remove: bool) -> None:
        """Write or remove. Raises FileExistsError when it is no longer as seen, as far as that can be told."""
        if remove:
            self.fs.rm_file(self.path)
            return
        self.fs.pipe_file(self.path, json_text(self.mine), mode="create" if seen is None else "overwrite")
        self._settle(seen)

    def age(self, path: str) -> float:
        """Seconds since a file was written, by its file system's clock; 0 where it has gone, or no time is told."""
        probe = str(Path(self.path).with_name(f".lock.json.{uuid.uuid4().hex}.tmp"))
        self.fs.pipe_file(probe, b"")
        try:
            return float((self.fs.modified(probe) - self.fs.modified(path)).total_seconds())
        except (FileNotFoundError, NotImplementedError):
            return 0.0
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(probe)

    def _settle(self, seen: Json | None) -> None:
        if seen is not None and not self._is_mine(seen):
            time.sleep(SETTLE_SECONDS)

    def _is_mine(self, seen: Json | None) -> bool:
        return seen is not None and bool(seen.get("token") == self.mine["token"])

    def _is_near(self, said: Json) -> bool:
        """Whether the holder is a process that this system knows."""
        return self.mine["system"] is not None and bool(said.get("system") == self.mine["system"])

    def _has_died(self, said: Json, path: str) -> bool:
        if self._is_near(said):
            return _started(said.get("process")) != said.get("started")
        return self.age(path) > STALE_SECONDS

    def _renew(self) -> None:
        """Until the end; interrupts the holder when its lock is lost."""
        while not self._ending.wait(RENEW_SECONDS):
            with contextlib.suppress(StorageError, OSError), reaching(self.store.display(LOCK)):
                if not self._is_mine(seen := self.read()):
                    break
                self.mine["renewed"] += 1
                self.swap(seen)
        if self._ending.is_set():  # and what was read last is what the end has left
            return
        ident = self._holder.ident or 0
        if self._holder is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            signal.pthread_kill(ident, signal.SIGINT)  # it ends a wait for workers too
        else:
            interrupt = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), interrupt)

    def _refusal(self, said: Json) -> ConfigError:
        if self._is_near(said):
            fix = f"wait until it has ended, or end it (kill {said['process']}), then run this command again"
        else:
            remove = "rm" if self.store.is_local else "aws s3 rm" if self.store.url.startswith(S3) else "remove"
            fix = (
                f"wait until it has ended. If it is dead, run this command again {STALE_SECONDS:.0f} seconds after its "
                f"last sign of life, or after: {remove} {self.store.display(LOCK)}"
            )
        return ConfigError(f"{self.store.url} is being written by {_name(said)}", fix)

    def _gone(self, seen: Json | None) -> StageError:
        now = f"{_name(seen)} has it" if seen else "it was removed"
        return StageError(
            f"{self.store.display(LOCK)} is no longer this command's: {now} (after {STALE_SECONDS:.0f} seconds without "
            "a sign of life others may go on, as when this machine sleeps)",
            "run the same command again when no other one writes the store: what is done is kept",
        )


class _FolderLock(_Lock):
    def change(self, seen: Json | None, *, remove: bool) -> None:
        # A claim goes only after what it claims. So who can create it while that is still there is alone with it.
        claim = Path(self.path).with_name(f".lock.json.{seen['tag'] if seen else NOTHING}.tmp")
        claim.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = hold(claim)
        except FileNotFoundError as error:  # another one has just removed the folder
            raise FileExistsError from error
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._has_died(_parse(claim.read_bytes()), str(claim)):
                    claim.unlink()
            raise
        try:
            with file:
                file.write(json_text(self.mine))
                file.flush()
                if self.read() != seen:
                    raise FileExistsError
                if remove:
                    Path(self.path).unlink()
                else:
                    claim.rename(self.path)
        finally:
            claim.unlink(missing_ok=True)


class _S3Lock(_Lock):
    """An object whose head has all that is asked: what the holder says, a tag, and the server's two dates."""

    def read(self) -> Json | None:
        try:
            head = self._call("head_object")
        except FileNotFoundError:
            return None
        return {**_parse(head["Metadata"].get("lock", "")), "tag": head["ETag"]}

    def change(self, seen: Json | None, *, remove: bool) -> None:
        method = "delete_object" if remove else "put_object"
        said = {"Body": json_text(self.mine), "Metadata": {"lock": json.dumps(self.mine)}}
        content: Json = {} if remove else said
        try:
            self._call(method, **content, **({"IfMatch": seen["tag"]} if seen else {"IfNoneMatch": "*"}))
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            if answer.get("Error", {}).get("Code") in CONDITION_FAILED:
                raise FileExistsError from error
            if error.errno != errno.ENOSYS:
                raise
            self._call(method, **content)  # to a server that refuses conditions
            self._settle(seen)

    def age(self, path: str) -> float:
        try:
            head = self._call("head_object")
        except FileNotFoundError:
            return 0.0
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - head["LastModified"]).total_seconds())

    def _call(self, method: str, **options: Any) -> Json:
        bucket, key, _ = self.fs.split_path(self.path)
        answer: Json = self.fs.call_s3(method, Bucket=bucket, Key=key, **options)
        return answer


def _parse(content: bytes | str) -> Json:
    """What a lock says; nothing where it is damaged, or is just being written."""
    try:
        said = json.loads(content)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _name(said: Json) -> str:
    verb, process, host, since = (said.get(key, "?") for key in ("verb", "process", "host", "since"))
    return f"`graphbuild {verb}` (process {process} on {host}, since {since})"


def _system() -> str | None:
    """This machine's boot and process namespace, in which number and start name a process; None where not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(process: Any) -> str | None:
    """When a process was started, in the system's ticks; None where it does not run."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
