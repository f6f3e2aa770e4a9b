"""Each script in `examples/` runs as it stands, against the session's application."""

from __future__ import annotations

import contextlib
import os
import runpy
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
}
"""How each line begins that a script prints."""
WITHOUT_RAY = {
    "library.py": ["The circle is blue.", "How many shapes are there? There is one", "Is there a star? No,"],
}
"""Of the one that runs in this process, which has torch already."""

NO_PICTURE = "The data is plain text; send the image in one of PNG, "
ANSWERS = ["1 The circle is red.", "2 There are two shapes in the picture."]
DATA_PRINTS = {
    "ray_data_serve.py": [*ANSWERS, f"3 llava_serve.errors.InvalidImageError: {NO_PICTURE}"],
    "ray_data_http.py": [*ANSWERS, f"3 {NO_PICTURE}"],
    "ray_data_engine.py": ANSWERS,
}
"""Of the scripts that use Ray Data, which takes its time."""


RACE = "The core worker has already been shutdown"
"""Of a thread of Serve's that is in Ray's code as the program ends: Ray's fault, and rare."""


def environment_of(served: Any) -> dict[str, str]:
    return {"RAY_ADDRESS": served.ray_address, "OPENAI_BASE_URL": f"{served.url}/v1"}


@pytest.fixture(scope="module")
def running(served: Any) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once: most of a script's time is its imports."""
    environment = os.environ | environment_of(served)
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as ended:
        scripts = {}
        for name in PRINTS:
            command = [sys.executable, str(EXAMPLES / name)]
            started = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            scripts[name] = ended.enter_context(started)
            ended.callback(started.kill)
        yield scripts


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_prints_the_right_answer(served: Any, running: dict[str, subprocess.Popen[str]], name: str) -> None:
    script = running[name]
    out, log = script.communicate(timeout=240)
    if script.returncode and RACE in log:
        environment = os.environ | environment_of(served)
        again = subprocess.run(script.args, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert (again.returncode, again.stdout) == (0, out), again.stderr
    else:
        assert script.returncode == 0, log
    check_lines(out, PRINTS[name])


@pytest.mark.parametrize("name", WITHOUT_RAY)
def test_an_example_without_ray_prints_the_right_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    check_lines(capsys.readouterr().out, WITHOUT_RAY[name])


def check_lines(out: str, begins: list[str]) -> None:
    lines = out.splitlines()
    assert len(lines) == len(begins), out
    for line, begin in zip(lines, begins, strict=True):
        assert line.startswith(begin)


@pytest.mark.extended
@pytest.mark.parametrize("name", DATA_PRINTS)
def test_a_ray_data_example_prints_the_right_answer(served: Any, name: str) -> None:
    environment = os.environ | environment_of(served)
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    check_lines(done.stdout, DATA_PRINTS[name])


def test_every_example_is_run_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {*PRINTS, *WITHOUT_RAY, *DATA_PRINTS, "trace_file.py"}  # tests/api/test_tracing.py runs that one
    readme = Path(ROOT / "README.md").read_text("utf-8")
    assert all(f"examples/{name}" in readme for name in names)
