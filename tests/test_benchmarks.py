"""Every benchmark runs with `--smoke`, and prints a figure."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from support.paths import ROOT

COMMANDS = [
    "autoscaling",
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
    "hostile",
    "linear",
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
    "counted",
    "docs_plots",
    "gpu_kernels",
    "gpu_model",
    "hostile_inputs",
    "in_process",
    "make_checkpoint",
    "options",
    "paced",
    "paced_tiers",
    "plot",
    "ray_job",
    "soak_requests",
}
"""Modules that the benchmarks share, and the one that draws their results."""


@pytest.mark.extended
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_a_figure(command: str, request: pytest.FixtureRequest) -> None:
    served: Any = request.getfixturevalue("served") if "{url}" in command else None
    name, *arguments = command.format(url=served and served.url).split()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    figures = [float(figure) for figure in re.findall(r"(?<=: )[\d.]+\b", done.stdout)]
    assert any(figure > 0 for figure in figures), done.stdout


def test_every_benchmark_is_run() -> None:
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert modules == PARTS | {command.split()[0] for command in COMMANDS}
