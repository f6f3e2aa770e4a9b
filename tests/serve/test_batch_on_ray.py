"""`llava-serve batch --address` on the session's cluster, beside the application that runs there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.batch_rows import scene_rows
from support.paths import ROOT

pytestmark = pytest.mark.extended


def batch(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava_serve.cli", "batch", str(source), str(out), "--temperature", "0", *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)


def test_the_clusters_answers_are_those_of_this_machine(served: Any, tmp_path: Path) -> None:
    source, out, here = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "here.jsonl"
    rows = [*scene_rows(tmp_path, 12), {"id": "bad", "image": "nowhere.png", "question": "What?"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert batch(source, here).returncode == 1
    done = batch(source, out, "--address", served.ray_address)
    assert done.returncode == 1, done.stderr
    assert out.read_bytes() == here.read_bytes()
    assert "out.jsonl has 13 rows, 1 error." in done.stderr

    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:7])[:-9])  # as a killed run leaves it
    resumed = batch(source, out, "--address", served.ray_address, "--workers", "2")
    assert "6 of them have their answers" in resumed.stderr
    assert out.read_bytes() == here.read_bytes()
