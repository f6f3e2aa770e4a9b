"""The set-up says in one clear sentence what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the set-up needs of a clone."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("llava_serve", "deployments"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def setup(clone: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "setup", *variables], cwd=clone, capture_output=True, text=True, check=False)


def test_no_python(clone: Path) -> None:
    done = setup(clone, "PYTHON=no-such-python")
    assert done.returncode
    assert done.stderr.startswith("Python 3.11 is needed, and no-such-python is not here; name one: make PYTHON=")


def test_an_old_python(clone: Path) -> None:
    old = clone / "old-python"
    old.write_text("#!/bin/sh\nif [ $1 = -V ]; then echo Python 3.8.1; else exit 1; fi\n")
    old.chmod(0o755)
    done = setup(clone, f"PYTHON={old}")
    assert done.returncode
    assert done.stderr.startswith(f"Python 3.11 is needed, and {old} is Python 3.8.1; name one: make PYTHON=")
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_no_network(clone: Path) -> None:
    unreachable = "--isolated --retries 0 --no-cache-dir --index-url http://127.0.0.1:9/simple"
    done = setup(clone, f"PYTHON={sys.executable}", f"PIP_ARGS={unreachable}")
    assert done.returncode
    assert done.stderr.startswith("The packages could not be installed: is the package index reachable?")
    assert not (clone / ".venv" / ".installed").exists()
