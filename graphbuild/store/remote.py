"""Files at any URL: how their file systems are opened, and what a lost connection or a full disk becomes.

An S3 request that is refused, throttled or cut is sent again by the client for half a minute, or as AWS_MAX_ATTEMPTS
and AWS_RETRY_MODE say. What fails beyond that is a StorageError that names the URL. Copies of remote files are kept on
this machine for a day after their last use, within CACHE_BYTES (`prune`), in a folder that only this user may open;
each process reads a copy whole, for its checksum, before it uses it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from graphbuild.errors import ConfigError, GraphbuildError, StorageError, install_extra
from graphbuild.store.checksum import file_sha256

S3 = ("s3://", "s3a://")
# Waits of 0.5, 1, 2, ... 16 seconds on average; throttled ones for longer.
S3_RETRIES = {"mode": "legacy", "max_attempts": 6}
S3_CONNECTIONS = 64  # botocore's own 10 make ten thousand small files a matter of minutes
READERS = 32  # small files that a process asks for at once
S3_VARIABLES = {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}  # by which users choose their own
CACHE_BYTES = 100 * 10**9
CACHE_SECONDS = 24 * 3600  # copies not used for so long go
SAFE_SECONDS = 3600  # copies used since then stay whatever their size: a process may be about to open them
PRUNE_LOOKS = 64
SUM = ".sha256"  # behind a copy's name: its checksum, and its `_state` when that was looked at
VERSIONS = ("ETag", "etag", "mtime", "created", "updated", "Last-Modified", "LastModified", "last_modified", "blob_id")
_PROCESS = uuid.uuid4().hex  # the version of a file whose server tells none: its copy serves this process alone
_until_pruned = 0  # copies that this process will fetch before it prunes again

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOST = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_CLIENTS = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))  # their errors are no OSError
ANEW = "a store keeps no query of a URL: give it again"
RERUN = "then run the same command again: what is done is kept"


def file_system(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        ValueError: fsspec knows none. ConfigError: its package is not installed.
    """
    if url.startswith(S3):
        given = fsspec.config.conf.get("s3", {}).keys() | os.environ.keys()
        if "config_kwargs" not in given:
            retries = {} if given & S3_VARIABLES else {"retries": S3_RETRIES}
            options["config_kwargs"] = {"max_pool_connections": S3_CONNECTIONS, **retries}
    try:
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        fix = install_extra("s3") if url.startswith(S3) else "install the package named there"
        raise ConfigError(f"{url} cannot be opened ({error})", fix) from None
    return found


@contextlib.contextmanager
def reaching(
    url: str, kind: type[GraphbuildError] = StorageError, folder: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """A lost connection, a server's refusal or a full disk as an error of that kind; files that are not there pass.

    folder: of this machine, which is written to.
    """
    try:
        yield
    except _failures() as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if _is_full(error):
            where = folder or tempfile.gettempdir()
            raise kind(f"{url}: no space is left in {where} ({said})", f"make room there, {RERUN}") from error
        if _is_lost(error, url):
            query = f"; {ANEW}" if url.startswith("http") else ""
            fix = f"see that it can be reached from here (network, credentials, endpoint{query}), {RERUN}"
            raise kind(f"{url} cannot be reached ({said})", fix) from error
        raise


def _failures() -> tuple[type[Exception], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _CLIENTS if module in sys.modules]
    return (OSError, *loaded)


def _is_full(error: Exception) -> bool:
    """Whether a disk, or what one may use of it, is full; numpy's error says so without a number."""
    return isinstance(error, OSError) and (
        error.errno in _FULL or (error.errno is None and str(error).endswith(" written"))
    )


def _is_lost(error: Exception, url: str) -> bool:
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return True
    return error.errno in _LOST or (isinstance(error, PermissionError) and "://" in url)


def cache_folder() -> Path:
    """This user's folder for copies of remote files, and for files on their way to a remote store.

    Raises:
        ConfigError: what has its name is a link, another user's, or open to others, who may have put anything there.
    """
    folder = Path(tempfile.gettempdir()) / f"graphbuild-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is no folder of this user alone (owner {found.st_uid}, mode {stat.filemode(found.st_mode)})",
            "remove it, or set TMPDIR to a folder that others cannot write to",
        )
    return folder


def version(info: Mapping[str, Any]) -> str | None:
    """What tells that a file has changed where its size has not: its ETag, or else a date; None: nothing does."""
    found = next((info[name] for name in VERSIONS if info.get(name)), None)
    return None if found is None else str(found)


def cached_copy(fs: fsspec.AbstractFileSystem, path: str, url: str, told: tuple[int, object] | None = None) -> Path:
    """A copy of a remote file in this user's cache folder, for as long as its size and `version` there are the same.

    Of a machine's workers that want it, one fetches it and the others wait. url: tells it from all other files. told:
    size and version, where a listing has just told them.
    """
    info = fs.info(path) if told is None else {}
    size, changed = told or (info["size"], version(info))
    identity = f"{url}|{size}|{changed or _PROCESS}"
    folder = cache_folder()
    copy = folder / hashlib.sha256(identity.encode()).hexdigest()
    if _is_whole(copy):
        return copy
    partial, lock = copy.with_suffix(f".{uuid.uuid4().hex}"), copy.with_suffix(".lock")
    with lock.open("w") as held:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            if not _is_whole(copy):
                fs.get_file(path, str(partial))
                os.utime(partial)
                sha256 = file_sha256(partial)
                partial.rename(copy)
                _note_whole(copy, sha256, _state(copy))
        finally:
            partial.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    _prune_in_turn(folder)
    return copy


def _is_whole(copy: Path) -> bool:
    """Whether a copy is there as it was fetched; notes its use. Of a machine's processes one looks at its checksum, as
    long as nobody writes to it: a hundred workers would else read all that they share a hundred times."""
    beside = copy.with_suffix(SUM)
    with contextlib.suppress(FileNotFoundError):
        os.utime(beside)
        state = _state(copy)
        sha256, _, known = beside.read_text().partition(" ")
        if known == state:
            return True
        if file_sha256(copy) == sha256:
            _note_whole(copy, sha256, state)
            return True
    return False


def _note_whole(copy: Path, sha256: str, state: str) -> None:
    beside = copy.with_suffix(f".{uuid.uuid4().hex}")
    beside.write_text(f"{sha256} {state}")
    beside.rename(copy.with_suffix(SUM))


def _state(copy: Path) -> str:
    """What changes when a file does, or the machine may have lost some of it in a crash."""
    found = copy.stat()
    return f"{_boot()} {found.st_ino} {found.st_size} {found.st_ctime_ns}"


@cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return _PROCESS  # which knows no more than itself


def _prune_in_turn(folder: Path) -> None:
    """`prune`, which looks at every copy, once in so many new ones that each costs a look at PRUNE_LOOKS others."""
    global _until_pruned
    _until_pruned -= 1
    if _until_pruned <= 0:
        _until_pruned = prune(folder) // PRUNE_LOOKS


def prune(folder: Path) -> int:
    """Remove copies that were not used for CACHE_SECONDS and, the longest unused first, what exceeds CACHE_BYTES.

    Returns how many were looked at.

    A process that has mapped a copy keeps it; on disk it ends when that process does.
    """
    copies = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            status, beside = path.stat(), path.with_suffix(SUM)
            used = beside.stat().st_mtime if beside.exists() else 0.0
            copies.append((max(used, status.st_mtime), status.st_size, path))
    kept, now = sum(size for _, size, _ in copies), time.time()
    for used, size, path in sorted(copies):
        idle = now - used
        if idle > CACHE_SECONDS or (kept > CACHE_BYTES and idle > SAFE_SECONDS):
            path.unlink(missing_ok=True)
            kept -= size
    return len(copies)
