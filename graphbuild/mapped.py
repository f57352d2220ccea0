"""Arrays in files, mapped read-only and without a descriptor kept open, as a store has thousands of them.

`numpy.load(..., mmap_mode="r")` keeps one a file (Python's mmap duplicates it), and 1,024 are all that most systems
allow a process. Cost: one mapping a file; nothing is read before it is used.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_array(path: Path) -> np.ndarray[Any, Any]:
    """The array of a .npy file, mapped as long as something refers to it; never unpickles.

    Raises:
        OSError or ValueError: the file cannot be read, is no .npy file, or is cut.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        content, begin = _map_bytes(file.fileno()), file.tell()
        if len(content) - begin < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it is cut: {len(content):,} bytes for {dtype} {list(shape)}")
        return np.ndarray(shape, dtype, content, begin, order="F" if fortran else "C")


def _map_bytes(descriptor: int) -> memoryview:
    size = os.fstat(descriptor).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    held = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(held, _libc.munmap, address, size).atexit = False  # a thread may still read then
    return memoryview(held).toreadonly()
