"""The processes of a running application: what they are, and how their memory develops."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import suppress

import numpy as np
import psutil

SAMPLE_S = 5.0

NOISE = 0.01
"""Growth by less than this part of a process's memory is noise: an allocator takes and returns its memory in pieces."""

PARTS = 10
"""Of the second half of the time. The means of parts tell how far the line may be wrong: samples that follow each other
are alike, and say little more than one of them."""

Samples = dict[str, list[tuple[float, float]]]
"""By process: minutes, and MiB."""


def watch_memory(pid: int, end: float) -> Samples:
    """Reads the resident memory of a process and of all below it, until the time is over.

    Args:
        end: on the clock of `time.monotonic`.
    """
    samples: Samples = defaultdict(list)
    began = time.monotonic()
    while time.monotonic() < end:
        now: Counter[str] = Counter()
        for each in processes(pid):
            with suppress(psutil.Error):
                now[title(each)] += each.memory_info().rss
        for name, rss in now.items():
            samples[name].append(((time.monotonic() - began) / 60, rss / 2**20))
        time.sleep(min(SAMPLE_S, max(0.1, (end - began) / 10)))
    return samples


def processes(pid: int) -> list[psutil.Process]:
    """The process, and all below it: of a local cluster that is all of Ray, Serve and the replicas."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def title(process: psutil.Process) -> str:
    """What the process is, short."""
    command = process.cmdline()
    if not command:
        return "ended"
    if command[0].startswith("ray::"):  # and then the class and, while it works, the method
        return command[0].removeprefix("ray::").removeprefix("ServeReplica:llava:").split(".")[0].split()[0]
    if "-m" in command:
        return command[command.index("-m") + 1].rpartition(".")[2]
    return next((command_file(each) for each in command if each.endswith(".py")), command_file(command[0]))


def command_file(path: str) -> str:
    """The name of a program."""
    return path.rpartition("/")[2].removesuffix(".py")


def memory(points: list[tuple[float, float]]) -> dict[str, float | bool]:
    """MiB at the start, in the middle, at the end, and at most; and of the second half what a line through it says.

    `slope` is in MiB per minute. `flat`: over the second half the line rises by less than twice the standard error of
    that rise, or by less than `NOISE` of the memory.
    """
    minutes, mib = np.asarray(points).T
    figures = {"start": mib[0], "middle": mib[len(mib) // 2], "end": mib[-1], "most": mib.max()}
    late = minutes >= minutes[-1] / 2
    if late.sum() < 3:
        return {name: round(float(figure), 1) for name, figure in figures.items()}
    slope, start = np.polyfit(minutes[late], mib[late], 1)
    growth = slope * np.ptp(minutes[late])
    parts = np.array_split(mib[late] - (start + slope * minutes[late]), min(PARTS, late.sum()))
    # Of slope * range, for evenly spaced times: their variance is a twelfth of their range's square.
    error = np.std([part.mean() for part in parts]) * np.sqrt(12 / len(parts))
    rounded = {name: round(float(figure), 1) for name, figure in figures.items()}
    return {**rounded, "slope": round(float(slope), 2), "flat": bool(growth <= max(2 * error, NOISE * mib[-1]))}
