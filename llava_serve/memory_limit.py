"""The limit on a child process's memory, which it sets for itself before it works on a stranger's input. On Linux."""

from __future__ import annotations

import resource


def limit_memory(more: int) -> None:
    """Bounds what this process may allocate from now on, in bytes, and writes no core if it ends at that.

    Not its address space, of which libraries reserve much.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        allocated = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (allocated + more, allocated + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
