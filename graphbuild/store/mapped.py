"""Arrays in files, mapped read-only and without a descriptor kept open, as a store has thousands of them.

`numpy.load(..., mmap_mode="r")` keeps one a file (Python's mmap duplicates it), and 1,024 are all that most systems
allow a process. Cost: one mapping a file, of which Linux allows a process 65,530 unless told otherwise
(vm.max_map_count); nothing is read before it is used.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np

from graphbuild.errors import ConfigError, StorageError

MOST = Path("/proc/sys/vm/max_map_count")
OTHERS = 2_000  # mappings of libraries and memory
_ONE_PARSER = threading.RLock()  # Python before 3.11.9 and 3.12.3 fails where two threads parse at once (gh-106905)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def map_array(path: Path) -> np.ndarray[Any, Any]:
    """The array of a .npy file, mapped as long as something refers to it; never unpickles.

    Raises:
        OSError or ValueError: the file cannot be read, is no .npy file, or is cut.
        StorageError: the process may not map another file.
    """
    with path.open("rb") as file:
        shape, fortran, dtype = read_header(file)
        try:
            content, begin = _map_bytes(file.fileno()), file.tell()
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            most = MOST.read_text().strip() if MOST.exists() else "its limit"
            raise StorageError(
                f"{path} cannot be mapped: no address space, or this process has {most} mappings already",
                "raise vm.max_map_count (and `ulimit -v`) on every node, then run the same command again",
            ) from None
        if len(content) - begin < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it is cut: {len(content):,} bytes for {dtype} {list(shape)}")
        return np.ndarray(shape, dtype, content, begin, order="F" if fortran else "C")


def read_soon(array: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    """Ask the system to read these rows of a mapped array, side by side and no others.

    Without it a row that is not in memory is waited for alone, and 128 kB are read for it. Cost of a row that is in
    memory: 3 microseconds.
    """
    size = array.strides[0]
    for begin in (array.__array_interface__["data"][0] + size * rows.astype(np.int64)).tolist():
        page = begin - begin % mmap.PAGESIZE
        _libc.madvise(page, begin + size - page, mmap.MADV_WILLNEED)  # no more than advice: a fault changes nothing


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns lie behind each other, and type of a .npy file, whose numbers come next; or ValueError."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _ONE_PARSER:
        shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return shape, fortran, dtype


def check_mappings(files: int) -> None:
    """ConfigError when a process may not map so many files; workers on other nodes find out for themselves."""
    if MOST.exists() and files + OTHERS > int(MOST.read_text()):
        raise ConfigError(
            f"a worker will map {files:,} files, and vm.max_map_count is {int(MOST.read_text()):,} here",
            f"`sysctl -w vm.max_map_count={2 * files + OTHERS}` on every node, or embed larger shards "
            "(10,000 samples or more a tar)",
        )


def _map_bytes(descriptor: int) -> memoryview:
    size = os.fstat(descriptor).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    held = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(held, _libc.munmap, address, size).atexit = False  # a thread may still read then
    return memoryview(held).toreadonly()
