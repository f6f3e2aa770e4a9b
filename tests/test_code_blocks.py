"""Every command and every piece of code in the documentation is run, or says why not.

In a folder like a clone's, against a server without Ray on another port than the 8000 of the text.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.code_blocks import PAGES, CodeBlock, code_blocks
from support.paths import ROOT

BLOCKS = [block for page in PAGES for block in code_blocks(page)]
TO_RUN = [block for block in BLOCKS if block.reason is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks run, one after the other, as a reader would: files that one writes are there for the next."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("llava_serve", "deployments", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_each_block_is_run_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = [f"  {block.page}:{block.line}: {block.reason}" for block in BLOCKS if block.reason]
    with capsys.disabled():
        print("", f"{len(TO_RUN)} blocks of the documentation are run, {len(skipped)} are not:", *skipped, sep="\n")
    assert TO_RUN
    assert {block.page for block in TO_RUN} >= {"index.md", "api.md"}


@pytest.mark.extended
@pytest.mark.parametrize("block", TO_RUN, ids=lambda block: f"{block.page}:{block.line}")
def test_it_runs(block: CodeBlock, folder: Path, served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    script = block.script.replace("localhost:8000", f"localhost:{port}")
    program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*program, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert block.is_shown(done.stdout), done.stdout
