"""What pyproject.toml says is installed is all that there is."""

from __future__ import annotations

import tomllib
from pathlib import Path

from support.paths import ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"llava_serve": "llava_serve", "llava_serve_deployments": "deployments"}
"""Of the two packages at the top."""


def files_of(folder: str, pattern: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts]


def test_every_package_is_named() -> None:
    found = set()
    for package, folder in FOLDERS.items():
        for path in files_of(folder, "*.py"):
            below = path.parent.relative_to(ROOT / folder)
            found.add(".".join((package, *below.parts)))
    assert set(SETUPTOOLS["packages"]) == found
    assert SETUPTOOLS["package-dir"] == {"llava_serve_deployments": "deployments"}


def test_every_other_file_is_package_data() -> None:
    for package, folder in FOLDERS.items():
        named = {path for pattern in SETUPTOOLS["package-data"][package] for path in (ROOT / folder).glob(pattern)}
        others = {path for path in files_of(folder, "*") if path.suffix != ".py"}
        assert {path for path in named if path.is_file()} == others


def test_the_files_that_ship_have_one_source() -> None:
    for name in SETUPTOOLS["package-data"]["llava_serve_deployments"]:
        assert (ROOT / "deployments" / name).is_symlink()
        assert (ROOT / "deployments" / name).samefile(ROOT / name)
