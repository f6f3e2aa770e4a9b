"""The kernels compiled for an H100 (sm_90) without one: nothing is spilled, and keys are loaded 16 bytes at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: `make test-kernels` installs it"
)
MOST_REGISTERS = 168
"""Three blocks of 128 threads on a multiprocessor, of 65,536 registers."""
MOST_SHARED = 100 << 10
"""Two blocks on a multiprocessor of an H100, which has 227 KiB."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What each kernel takes, by its name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    program = Path(__file__).parents[2] / "support" / "kernel_resources.py"
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=280, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("name"): line for line in lines}


def test_nothing_is_spilled(compiled: dict[str, dict[str, int]]) -> None:
    assert len(compiled) == 15
    for name, found in compiled.items():
        assert (found["stack"], found["local"]) == (0, 0), (name, found)
        assert found["registers"] <= MOST_REGISTERS, (name, found)
        assert found["shared"] <= MOST_SHARED, (name, found)


def test_memory_is_read_16_bytes_at_a_time(compiled: dict[str, dict[str, int]]) -> None:
    for name in ("add_rmsnorm", "silu_mul"):
        assert compiled[name]["wide_loads"] == compiled[name]["loads"] > 0, (name, compiled[name])
    for name, found in compiled.items():
        if name.startswith("attend"):
            assert found["wide_loads"] >= (4 if name.endswith("fp8") else 16), (name, found)
