"""`llava-serve serve --in-process` as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from support.paths import ROOT


def serve_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llava_serve.cli", "serve", *map(str, arguments)]


@contextmanager
def serve_in_process(model: object, *arguments: object, named: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running `serve --in-process` of a model, which it must call `named`; and its URL."""
    process = subprocess.Popen(
        serve_command("--in-process", "--model", model, "--device", "cpu", *arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"Serving {named} on http://" in line
        yield line.split(" on ")[1].split()[0], process
    finally:
        process.kill()
        process.communicate()
