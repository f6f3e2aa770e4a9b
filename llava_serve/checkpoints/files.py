"""Reading a checkpoint's small files, and finding its weight files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.bounds import check_size, check_values
from llava_serve.errors import CheckpointError


def read_json(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object; an absent optional file is an empty one.

    Raises:
        CheckpointError: absent, cut off, no JSON object, or beyond the bounds of `llava_serve.checkpoints.bounds`.
    """
    path = folder / name
    if optional and not path.is_file():
        return {}
    check_size(path)
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing in {folder}; copy it there.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} in {folder} is damaged: it is not JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} in {folder} is damaged: it is no JSON object. Download it again.")
    check_values(name, folder, value)
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files of a full set of weights, in transformers' order: safetensors before `.bin`, of each one file before
    shards; empty if there is none.

    Raises:
        CheckpointError: an index names a file that is not there, or not of this folder.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        if (folder / f"{stem}.index.json").is_file():
            index = read_json(folder, f"{stem}.index.json").get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError(
                    f"{stem}.index.json in {folder} is damaged: it has no weight_map. Download it again."
                )
            _check_names(index.values(), f"{stem}.index.json", folder)
            paths = [folder / name for name in sorted(set(index.values()))]
            for path in paths:
                if not path.is_file():
                    raise CheckpointError(
                        f"{path.name} is missing in {folder}, though {stem}.index.json names it; copy it "
                        f"there{_or_unite(folder)}."
                    )
            return paths
        if shards := _without_index(folder, stem):
            return shards
    return []


def _check_names(names: Iterable[Any], index: str, folder: Path) -> None:
    """Refuses what is not the plain name of a file: an index names those beside it."""
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise CheckpointError(
                f"{index} in {folder} names {str(name)[:100]!r}, which is no file beside it; download it again."
            )


def _without_index(folder: Path, stem: str) -> list[Path]:
    """The shards of a set of weights whose index is not there; loading finds out whether a tensor is missing."""
    name, _, kind = stem.partition(".")
    shards = sorted(folder.glob(f"{name}-*-of-*.{kind}"))
    if shards:
        count = int(shards[0].stem.rpartition("-")[2])
        expected = [folder / f"{name}-{i:05}-of-{count:05}.{kind}" for i in range(1, count + 1)]
        if missing := [path.name for path in expected if path not in shards]:
            raise CheckpointError(
                f"{missing[0]} is missing in {folder}, and so is {stem}.index.json; copy both there{_or_unite(folder)}."
            )
    return shards


def no_weights(folder: Path) -> str:
    """The start of a message on a folder without weights; it names what training leaves instead."""
    step = training_step(folder)
    hint = f" but DeepSpeed's {step}, which its zero_to_fp32.py turns into them" if step else ""
    return f"{folder} holds no weights{hint}"


def _or_unite(folder: Path) -> str:
    step = training_step(folder)
    return f", or make the weights of DeepSpeed's {step} with its zero_to_fp32.py" if step else ""


def training_step(folder: Path) -> str | None:
    """The folder that DeepSpeed leaves in that of a training run: it holds the weights in parts."""
    return next((path.name for path in sorted(folder.glob("global_step*"))), None)


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of some files that exists."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def gigabytes(size: int) -> str:
    """A number of bytes, for a person."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
