"""The names of a folder's tensors, without torch and without reading a tensor."""

from __future__ import annotations

import json
import pickletools
import struct
import zipfile
from pathlib import Path

from llava_serve.checkpoints.files import read_json, weight_files


def weight_names(folder: Path) -> frozenset[str]:
    """The names of all tensors in a folder's full set of weights; none of a `.bin` of before torch 1.6, or of a damaged
    file, which loading names.

    Raises:
        CheckpointError: as `weight_files`.
    """
    names: set[str] = set()
    for file in weight_files(folder):
        whole = "model.safetensors" if file.suffix == ".safetensors" else "pytorch_model.bin"
        index = folder / f"{whole}.index.json"
        if file.name != whole and index.is_file():
            return frozenset(read_json(folder, index.name)["weight_map"])
        try:
            names |= _in_safetensors(file) if file.suffix == ".safetensors" else _in_bin(file)
        except (OSError, ValueError, struct.error, KeyError, zipfile.BadZipFile):
            continue
    return frozenset(names)


def _in_safetensors(file: Path) -> set[str]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return {*json.loads(stream.read(min(size, file.stat().st_size)))} - {"__metadata__"}


def _in_bin(file: Path) -> set[str]:
    """All strings of the pickle, which is disassembled and not run."""
    with zipfile.ZipFile(file) as archive:
        (listing,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return {value for _, value, _ in pickletools.genops(archive.read(listing)) if isinstance(value, str)}
