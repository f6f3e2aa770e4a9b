"""A checkpoint's tensors under this project's names, read one by one.

The names are those of `Llava`'s modules: `vision_tower.*` (transformers' CLIPVisionModel), `projector.N.{weight,bias}`,
`image_newline`, and `language_model.*` (transformers' causal language model).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_serve.checkpoints.files import first_file, weight_files
from llava_serve.checkpoints.lora import Delta, read_deltas
from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        file: that holds it.
        shape: its shape.
        read: gives the tensor in its stored precision, backed by the mapped file where the format allows.
        delta: a LoRA's addition to it.
    """

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    delta: Delta | None = None


_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), name) for pattern, name in pairs)


# The first pattern that matches the start of a name decides; an empty name passes the tensor over.
_PASSED_OVER = ((r".*\.(inv_freq|position_ids)$", ""),)
_ORIGINAL = _rules(
    *_PASSED_OVER,
    (r"(model|transformer)\.mm_projector\.(?=\d)", "projector."),
    (r"(model|transformer)\.mm_projector\.", "projector.0."),
    (r"(model|transformer)\.image_newline", "image_newline"),
    (r"(model|transformer)\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"", "language_model."),
)
_TRANSFORMERS = _rules(
    *_PASSED_OVER,
    (r"(model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    (r"(model\.)?image_newline", "image_newline"),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"(model\.language_model|language_model\.model|language_model)\.", "language_model.model."),
)
_TOWER = _rules(
    *_PASSED_OVER,
    (r"(text_model\.|text_projection|visual_projection|logit_scale)", ""),
    (r"(vision_model\.)?", "vision_tower."),
)


def stored_tensors(spec: CheckpointSpec) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, its base and its tower, later ones over earlier ones.

    Raises:
        CheckpointError: a file is missing, cut off, or holds more than tensors.
    """
    rules = _ORIGINAL if spec.layout == "original" else _TRANSFORMERS
    tensors = _renamed(weight_files(spec.base or spec.path), rules)
    if spec.adapter == "projector":
        tensors |= _renamed([spec.path / "mm_projector.bin"], rules)
    if spec.adapter == "lora":
        tensors |= _renamed([_non_lora(spec.path)], rules)
        tensors = _with_deltas(tensors, spec, rules)
    has_tower = any(name.startswith("vision_tower.") for name in tensors)
    if spec.tower is not None and not (spec.tower_in_checkpoint and has_tower):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_tower.")}
        files = weight_files(spec.tower)
        if not files:
            raise CheckpointError(f"The vision tower {spec.tower.name} holds no weights: name a folder that does.")
        tensors |= _renamed(files, _TOWER)
    return tensors


def _non_lora(folder: Path) -> Path:
    path = first_file(folder, "non_lora_trainables.bin", "non_lora_trainables.safetensors")
    if path is None:
        raise CheckpointError(f"non_lora_trainables.bin is missing in {folder}: the adapter's projector is in it.")
    return path


def _with_deltas(tensors: dict[str, StoredTensor], spec: CheckpointSpec, rules: _Rules) -> dict[str, StoredTensor]:
    path = first_file(spec.path, "adapter_model.safetensors", "adapter_model.bin")
    if path is None:
        raise CheckpointError(f"adapter_model.safetensors (or .bin) is missing in {spec.path}.")
    stored = read_file(path)
    deltas = read_deltas(spec.path, path, {name: (tensor.shape, tensor.read) for name, tensor in stored.items()})
    base = spec.base.name if spec.base else "the base"
    for module, delta in deltas.items():
        name = _rename(f"{module}.weight", rules)
        target = tensors.get(name)
        if target is None or target.shape != delta.shape:
            have = "which it does not have" if target is None else f"which is {target.shape} there, not {delta.shape}"
            raise CheckpointError(f"{path.name} adds to {module} of {base}, {have}: it was trained on another base.")
        tensors[name] = StoredTensor(target.file, target.shape, target.read, delta)
    return tensors


def _renamed(files: Iterable[Path], rules: _Rules) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            ours = _rename(name.removeprefix("base_model.model."), rules)
            if ours:
                tensors[ours] = tensor
    return tensors


def _rename(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        match = pattern.match(name)
        if match:
            return replacement + name[match.end() :] if replacement else ""
    return name


def read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: cut off, no weights file, or a pickle with code in it (nothing of which is run).
    """
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} holds more than tensors; it is refused, and nothing in it was run."
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing in {path.parent}.") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} in {path.parent} is damaged or cut off.") from error


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    file: Any = safe_open(path, "pt")
    names = list(file.keys())
    return {
        name: StoredTensor(path, tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
        for name in names
    }


def _read_bin(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch's older format cannot be mapped
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path.name} holds no table of tensors.")
    return {name: StoredTensor(path, tuple(value.shape), value.detach) for name, value in tensors.items()}
