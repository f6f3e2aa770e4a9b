"""The set-up says in one clear sentence what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import ROOT

NEEDED = "Python 3.11, 3.12 or 3.13 is needed"
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the set-up needs of a clone."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in PACKAGES:
        folder = tmp_path / package.replace("llava_serve_deployments", "deployments").replace(".", "/")
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text('__version__ = "0"\n')
    return tmp_path


def setup(clone: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "setup", *variables], cwd=clone, capture_output=True, text=True, check=False)


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return path


def test_no_python(clone: Path) -> None:
    done = setup(clone, "PYTHON=no-such-python")
    assert done.returncode
    assert done.stderr.startswith(f"{NEEDED}, and no-such-python is not here; name one: make PYTHON=")


def test_an_old_python(clone: Path) -> None:
    old = script(clone / "old-python", "[ $1 = -V ] && echo Python 3.10.13")
    done = setup(clone, f"PYTHON={old}")
    assert done.returncode
    assert done.stderr.startswith(f"{NEEDED}, and {old} is Python 3.10.13; name one: make PYTHON=")
    assert not (clone / ".venv").exists()


def test_a_shim_that_stands_for_no_python_is_not_quoted(clone: Path) -> None:
    shim = script(clone / "python3.12", "echo 'pyenv: python3.12: command not found' >&2", "exit 127")
    done = setup(clone, f"PYTHON={shim}")
    assert done.stderr.startswith(f"{NEEDED}, and {shim} is not here; name one: make PYTHON=")
    assert "pyenv" not in done.stderr


@pytest.fixture
def pythons(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts programs first on the path that say their version, or none, and note that they shall make an environment."""

    def put(*there: str) -> None:
        for name in ("python3.11", "python3.12", "python3.13"):
            version = name.removeprefix("python") if name in there else ""
            (clone / "programs").mkdir(exist_ok=True)
            lines = (f'[ "$1" = -c ] && echo {version}', f'[ "$2" = venv ] && echo {name} > taken', "exit 1")
            script(clone / "programs" / name, *lines)
        monkeypatch.setenv("PATH", str(clone / "programs"), prepend=":")

    return put


@pytest.mark.parametrize(
    ("there", "named", "taken"),
    [
        (["python3.11", "python3.12", "python3.13"], [], "python3.11"),
        (["python3.12", "python3.13"], [], "python3.13"),
        (["python3.11", "python3.12"], ["PYTHON=python3.12"], "python3.12"),
    ],
)
def test_the_python_that_is_taken(
    clone: Path, pythons: Callable[..., None], there: list[str], named: list[str], taken: str
) -> None:
    pythons(*there)
    setup(clone, *named)
    assert (clone / "taken").read_text().strip() == taken


def test_a_python_that_is_named_replaces_another(clone: Path, pythons: Callable[..., None]) -> None:
    pythons("python3.11", "python3.12")
    (clone / ".venv" / "bin").mkdir(parents=True)
    script(clone / ".venv" / "bin" / "python", "echo 3.11")
    (clone / ".venv" / ".installed").touch()
    for same in ([], ["PYTHON=python3.11"]):
        assert setup(clone, *same).returncode == 0
        assert not (clone / "taken").exists()
    setup(clone, "PYTHON=python3.12")
    assert (clone / "taken").read_text().strip() == "python3.12"


@pytest.mark.slow
def test_no_network(clone: Path) -> None:
    unreachable = "--isolated --retries 0 --no-cache-dir --index-url http://127.0.0.1:9/simple"
    done = setup(clone, f"PYTHON={sys.executable}", f"PIP_ARGS={unreachable}")
    assert done.returncode
    assert done.stderr.startswith("The packages could not be installed: is the package index reachable?")
    assert not (clone / ".venv" / ".installed").exists()
