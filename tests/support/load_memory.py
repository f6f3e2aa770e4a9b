"""Loads a checkpoint and prints, as JSON, the anonymous memory that this process had before and at the peak, in bytes.

A program of its own, since a test's process has memory of other tests.
"""

from __future__ import annotations

import json
import sys
import threading

import torch

from llava_serve.checkpoints import open_checkpoint
from llava_serve.model.llava import Llava


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def main(folder: str, dtype: str) -> None:
    spec = open_checkpoint(folder)
    before = anonymous_bytes()
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = Llava.load(spec, "cpu", getattr(torch, dtype))
    peak = max(peak, anonymous_bytes())
    done.set()
    watcher.join()
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    print(json.dumps({"before": before, "peak": peak, "weights": sum(sizes), "largest": max(sizes)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
