"""Each script in `examples/` runs as it stands, against the session's application."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

EXAMPLES = ROOT / "examples"
PRINTS: dict[str, list[str]] = {
    "driver.py": ["The circle is red.", "There are two shapes in the picture. stop", "Refused: "],
    "task.py": ["What colour is the circle? The circle is red.", "How many shapes are there? There are two"],
    "actor.py": ["What colour is the circle? The circle is red.", "How many shapes", "Is there a star? No,"],
    "streaming.py": ["There is a red circle and a blue square in the picture.", "Closed."],
    "asynchronous.py": [
        "What colour is the circle? The circle is red.",
        "How many shapes are there? There are two",
        "Is there a star? No,",
        "The circle is red.",
    ],
    "openai_http.py": ["The circle is red.", "", "The circle is red."],
    "library.py": ["The circle is blue.", "How many shapes are there? There is one", "Is there a star? No,"],
}
"""How each line begins that a script prints."""


@pytest.fixture(scope="module")
def running(served: Any) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once: most of a script's time is its imports."""
    environment = os.environ | {"RAY_ADDRESS": served.ray_address, "OPENAI_BASE_URL": f"{served.url}/v1"}
    pipe = subprocess.PIPE
    scripts = {
        name: subprocess.Popen([sys.executable, EXAMPLES / name], env=environment, stdout=pipe, stderr=pipe, text=True)
        for name in PRINTS
    }
    yield scripts
    for script in scripts.values():
        script.kill()
        script.wait()


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_prints_the_right_answer(running: dict[str, subprocess.Popen[str]], name: str) -> None:
    out, log = running[name].communicate(timeout=240)
    assert running[name].returncode == 0, log
    lines = out.splitlines()
    assert len(lines) == len(PRINTS[name]), out
    for line, begin in zip(lines, PRINTS[name], strict=True):
        assert line.startswith(begin)


def test_every_example_is_run_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(PRINTS)
    readme = Path(ROOT / "README.md").read_text("utf-8")
    assert all(f"examples/{name}" in readme for name in names)
