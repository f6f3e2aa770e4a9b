"""What a control group (version 2), such as a container's, leaves to this process."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""That of a container, as it is seen inside."""


def container_memory(cgroup: Path) -> int:
    """Bytes that a control group leaves; files that it has only cached can be dropped.

    Args:
        cgroup: its folder. Where that holds no limit, this is a number above any memory.
    """
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # none, or "max"
        return 1 << 62
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def available_cores(cgroup: Path = CGROUP) -> int:
    """CPU cores that this process may use, within its affinity and its container's quota, of which a part counts as
    one: with more threads than its quota, all of them stop for the rest of a period. Not OMP_NUM_THREADS: Ray sets it
    to the CPUs that a replica reserves."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # none, or "max"
        return cores
