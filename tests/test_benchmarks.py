"""Every benchmark runs with `--smoke`, and prints a figure; what is kept of one is right."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from functools import cache
from statistics import linear_regression
from typing import Any

import pytest

from support.paths import ROOT
from testbed.processes import memory

COMMANDS = [
    "autoscaling",
    "background_compile",
    "batch_class",
    "client_hop",
    "compare",
    "compare --structured",
    "compare --without-max-tokens",
    "decode_hop",
    "engine_costs bookkeeping",
    "engine_costs gaps",
    "engine_costs memory",
    "engine_costs steps",
    "gpu_round",
    "grammars",
    "hostile",
    "linear",
    "load_ramp",
    "overhead",
    "pictures",
    "pressure",
    "refusals",
    "routing",
    "serve_clients --url {url}",
    "soak",
]
PARTS = {
    "__init__",
    "docs_plots",
    "gpu_decode",
    "gpu_kernels",
    "gpu_model",
    "machine",
    "make_checkpoint",
    "options",
    "paced",
    "paced_tiers",
    "plot",
    "ray_job",
    "soak_requests",
    "vllm_environment",
}
"""Modules that the benchmarks share, and the one that draws their results."""
LINES: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "linear.json").read_text("utf-8"))["kinds"]
"""Processor time against size, by kind of input: the kept results of `benchmarks.linear`."""


@cache
def printed(command: str) -> str:
    """What a benchmark prints."""
    name, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.extended
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_a_figure(command: str, request: pytest.FixtureRequest) -> None:
    served: Any = request.getfixturevalue("served") if "{url}" in command else None
    stdout = printed(command.format(url=served and served.url))
    figures = [float(figure) for figure in re.findall(r"(?<=: )[\d.]+\b", stdout)]
    assert any(figure > 0 for figure in figures), stdout


@pytest.mark.extended
def test_the_kept_lines_are_those_that_are_measured() -> None:
    assert LINES.keys() == json.loads(printed("linear"))["kinds"].keys()


def test_the_kept_lines_are_straight_and_no_input_is_a_fault() -> None:
    """The times themselves are kept results: a busy machine would fail a test."""
    assert not [name for name, line in LINES.items() if line["status"] >= 500]
    for name, line in LINES.items():
        size, taken = zip(*[map(math.log, point) for point in line["points"][-3:]], strict=True)
        assert line["exponent"] == pytest.approx(linear_regression(size, taken).slope, abs=0.006), name
        assert line["exponent"] < 1.25, name


@pytest.mark.parametrize(
    ("per_minute", "scatter", "flat"),
    [
        (0.0, 0.0, True),
        (0.0, 20.0, True),
        (0.2, 0.5, True),
        (0.5, 30.0, True),
        (1.0, 0.5, False),
        (5.0, 30.0, False),
        (-3.0, 0.5, True),
    ],
)
def test_a_soak_distinguishes_growth_from_noise(per_minute: float, scatter: float, flat: bool) -> None:
    """Twenty minutes of a process of 300 MiB, whose caches fill in the first half."""
    rng = random.Random(0)
    minutes = [second / 60 for second in range(0, 1200, 5)]
    points = [(at, 200 + min(100.0, 10 * at) + per_minute * at + rng.gauss(0, scatter)) for at in minutes]
    assert memory(points)["flat"] is flat


def test_every_benchmark_is_run() -> None:
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert modules == PARTS | {command.split()[0] for command in COMMANDS}
