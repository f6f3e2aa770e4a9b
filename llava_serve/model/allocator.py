"""How glibc's `malloc` takes the memory of tensors from the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL = 64 << 10
_LARGEST = 32 << 20
"""The highest threshold that glibc sets by itself."""
_USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def mapped_tensors() -> Iterator[None]:
    """Takes each tensor's memory from the system by itself, so that all of it is given back when the tensor is freed.

    glibc does so for large blocks, and raises what it calls large to the size of each that is freed, up to 32 MiB.
    From then on a tensor that is freed between two that stay leaves a gap: a model whose files are unpacked layer by
    layer took 1.1 to 1.7 times its own memory, differently in each run. Afterwards the threshold is the one that glibc
    reaches by itself, since what a step of the engine allocates is better kept in the process. With another C library,
    or where the environment has settings for `malloc`, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _USER_SETTINGS):
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
