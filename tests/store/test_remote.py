"""Copies of remote files: where they lie, whose they are, and that they are what the server has now."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from graphbuild.errors import ConfigError
from graphbuild.store import remote
from graphbuild.store.files import file_identity
from graphbuild.store.store import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache folder will be; not there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"graphbuild-cache-{os.getuid()}"


@pytest.fixture
def store(folder: Path) -> Store:
    made = Store(f"memory://remote/{folder.parent.name}")
    made.write_bytes("x.bin", b"content")
    return made


@pytest.mark.parametrize("made", ["link", "writable", "readable", "file", "stranger"])
def test_a_cache_folder_that_others_may_have_filled_is_refused(folder: Path, store: Store, made: str) -> None:
    if made == "link":
        (folder.parent / "elsewhere").mkdir(mode=0o700)
        folder.rmdir()
        folder.symlink_to(folder.parent / "elsewhere")
    elif made == "file":
        folder.rmdir()
        folder.touch(mode=0o700)
    elif made == "stranger":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, -1)
    else:
        folder.chmod(0o770 if made == "writable" else 0o755)
    for use in (lambda: store.local_copy("x.bin"), lambda: store.write_bytes("y.bin", b"")):
        with pytest.raises(ConfigError, match=rf"{folder} is no folder of this user alone.*\n.*set TMPDIR"):
            use()
    assert not (folder.parent / "elsewhere").exists() or not any((folder.parent / "elsewhere").iterdir())


def test_the_cache_folder_is_of_this_user_alone_whatever_the_umask(folder: Path, store: Store) -> None:
    folder.rmdir()
    before = os.umask(0)
    try:
        store.local_copy("x.bin")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["cut", "changed", "replaced", "lost in a crash", "without a sum"])
def test_a_copy_that_is_not_as_it_was_fetched_is_fetched_again(
    store: Store, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = store.local_copy("x.bin")
    time.sleep(0.02)  # a tick of the file system's clock
    if damage == "without a sum":
        copy.with_suffix(remote.SUM).unlink()
    elif damage == "replaced":
        (copy.parent / "other").write_bytes(b"CONTENT")
        (copy.parent / "other").rename(copy)
    else:
        before = copy.stat()
        copy.write_bytes(b"conten" if damage == "cut" else b"CONTENT")
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
        if damage == "lost in a crash":  # whose dates came through
            sha256 = hashlib.sha256(b"content").hexdigest()
            copy.with_suffix(remote.SUM).write_text(f"{sha256} {remote._state(copy)}")
            monkeypatch.setattr(remote, "_boot", lambda: "another boot")
    assert store.local_copy("x.bin").read_bytes() == b"content"


def test_a_copy_that_nobody_wrote_to_is_read_for_its_checksum_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = store.local_copy("x.bin")
    monkeypatch.setattr(remote, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert store.local_copy("x.bin") == copy


def test_a_copy_in_use_stays_when_others_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes("y.bin", b"another")
    copies = [store.local_copy(name) for name in ("x.bin", "y.bin")]
    long_ago = time.time() - remote.CACHE_SECONDS - 10
    for path in copies[0].parent.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert store.local_copy("y.bin") == copies[1]
    remote.prune(copies[0].parent)
    assert set(copies[0].parent.iterdir()) == {copies[1], copies[1].with_suffix(remote.SUM)}


Files = dict[str, tuple[bytes, dict[str, str]]]


@pytest.fixture
def web() -> Iterator[tuple[str, Files, Counter[str]]]:
    """The address of a server, its files with their headers, and how often each was sent."""
    files: Files = {}
    sent = Counter[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content, headers = files.get(self.path, (None, {}))
            self.send_response(404 if content is None else 200)
            for name, value in {**headers, "Content-Length": str(len(content or b""))}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            sent[self.path] += 1
            self.wfile.write(files.get(self.path, (b"", {}))[0])

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files, sent
        server.shutdown()


def npy(folder: Path, value: float) -> bytes:
    np.save(folder / "x.npy", np.full(5, value))
    return (folder / "x.npy").read_bytes()


@pytest.mark.parametrize("told_by", ["ETag", "Last-Modified"])
def test_a_copy_of_a_store_behind_http_is_used_until_the_file_changes_there(
    folder: Path, web: tuple[str, Files, Counter[str]], told_by: str
) -> None:
    address, files, sent = web
    for version, value in enumerate((1.0, 2.0)):  # of one size
        files["/store/x.npy"] = npy(folder.parent, value), {told_by: f'"{version}"'}
        for _ in range(3):
            assert Store(f"{address}/store").array("x.npy").tolist() == [value] * 5
        assert sent["/store/x.npy"] == version + 1


def test_where_a_server_tells_neither_etag_nor_date_a_copy_serves_one_process(
    folder: Path, web: tuple[str, Files, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files, _ = web
    for value in (1.0, 2.0):
        files["/store/x.npy"] = npy(folder.parent, value), {}
        monkeypatch.setattr(remote, "_PROCESS", f"process {value}")
        assert Store(f"{address}/store").array("x.npy").tolist() == [value] * 5


def test_a_source_behind_http_that_changed_within_its_size_is_another(web: tuple[str, Files, Counter[str]]) -> None:
    address, files, _ = web
    found = []
    for date in ("Sat, 28 Nov 2026 20:00:00 GMT", "Sat, 28 Nov 2026 21:00:00 GMT"):
        files["/list.csv"] = b"caption\na\n", {"Last-Modified": date}
        found.append(file_identity(f"{address}/list.csv"))
    assert found[0] != found[1]
