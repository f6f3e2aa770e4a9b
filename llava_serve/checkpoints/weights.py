"""A checkpoint's tensors under this project's names, read one by one."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_serve.checkpoints.experts import join_experts
from llava_serve.checkpoints.files import first_file, training_step, weight_files
from llava_serve.checkpoints.lora import read_adapter
from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.checkpoints.stored_tensor import StoredTensor
from llava_serve.checkpoints.weight_mapping import LAYOUTS, TOWER, Rules, our_name
from llava_serve.errors import CheckpointError

_log = logging.getLogger(__name__)

_TABLE, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def stored_tensors(spec: CheckpointSpec) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, its base and its tower, by our names; the adapter's over the base's.

    Raises:
        CheckpointError: a file is missing, damaged, or holds more than tensors; an adapter does not fit its base.
    """
    rules = LAYOUTS[spec.layout]
    tensors = _renamed(weight_files(spec.base or spec.path), rules)
    if spec.adapter is not None:
        own = _beside(spec, has_projector=any(name.startswith("projector.") for name in tensors))
        tensors = _over(tensors, _renamed(own, rules))
    if spec.adapter == "lora":
        tensors = _with_adapter(tensors, spec, rules)
    has_tower = any(name.startswith("vision_tower.") for name in tensors)
    if spec.tower is not None and not (spec.tower_in_checkpoint and has_tower):
        if has_tower and spec.adapter is not None:  # without an adapter the description has a note on it
            _log.warning("%s: the vision tower in its files is not used; the weights are %s.", spec.name, spec.tower)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_tower.")}
        files = weight_files(spec.tower)
        if not files:
            raise CheckpointError(
                f"The vision tower {spec.tower} holds no weights, neither model.safetensors nor pytorch_model.bin; "
                "name a folder that does with vision_tower (--vision-tower)."
            )
        tensors |= _renamed(files, TOWER)
    return join_experts(tensors)


def _over(base: dict[str, StoredTensor], own: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """An adapter's tensors over its base's. A base that is a LLaVA itself may have a projector of another depth."""
    if any(name.startswith("projector.") for name in own):
        base = {name: tensor for name, tensor in base.items() if not name.startswith("projector.")}
    return base | own


def _beside(spec: CheckpointSpec, *, has_projector: bool) -> list[Path]:
    """The file of an adapter's projector: in its folder, or in that of the training run of a `checkpoint-N`."""
    if spec.adapter == "projector":
        return [spec.path / "mm_projector.bin"]
    names = ("non_lora_trainables.bin", "non_lora_trainables.safetensors", "mm_projector.bin")
    is_step = re.fullmatch(r"checkpoint-\d+", spec.path.name) is not None
    for folder in (spec.path, *([spec.path.parent] if is_step else ())):
        if (path := first_file(folder, *names)) is not None:
            return [path]
    if not has_projector:
        raise CheckpointError(
            f"non_lora_trainables.bin is missing in {spec.path}; the adapter's projector is in it: copy it there, or "
            "mm_projector.bin."
        )
    if spec.layout == "original":
        _log.warning(
            "%s: %s has no non_lora_trainables.bin; the projector is that of %s.", spec.name, spec.path, spec.base
        )
    return []


def _with_adapter(tensors: dict[str, StoredTensor], spec: CheckpointSpec, rules: Rules) -> dict[str, StoredTensor]:
    path = first_file(spec.path, "adapter_model.safetensors", "adapter_model.bin")
    if path is None:
        raise CheckpointError(f"adapter_model.safetensors (or .bin) is missing in {spec.path}; copy it there.")
    stored = read_file(path)
    shapes = {name: (tensor.shape, tensor.read) for name, tensor in stored.items()}
    adapter = read_adapter(spec.path, path, shapes, rounded=spec.layout == "original")
    saved = {our_name(parameter, rules) or "": stored[name] for parameter, name in adapter.saved.items()}
    table = tensors.get(_TABLE)
    if _TABLE in saved and table is not None and spec.text_config.get("tie_word_embeddings"):
        tensors.setdefault(_HEAD, table)  # PEFT copies the table that it trains: a head tied to it stays as it was
    tensors |= saved
    for module, (ids, name) in adapter.tokens.items():
        ours, table = _target(tensors, f"{module}.weight", rules, path, spec)
        tensors[ours] = table.replaced_at(ids, stored[name])
    unused = [module for module in adapter.deltas if _is_tower_elsewhere(our_name(module, rules) or "", spec)]
    if unused:
        _log.warning(
            "%s: %s adds to %s and %d more modules of a vision tower that is not used; the tower is %s.",
            *(spec.name, path.name, unused[0], len(unused) - 1, spec.tower),
        )
    for module, delta in adapter.deltas.items():
        if module in unused:
            continue
        ours, target = _target(tensors, f"{module}.weight", rules, path, spec, delta.shape)
        tensors[ours] = replace(target, delta=delta)
    return tensors


def _is_tower_elsewhere(ours: str, spec: CheckpointSpec) -> bool:
    """Whether a tensor is one of a tower whose weights are those in another folder."""
    return ours.startswith("vision_tower.") and spec.tower is not None and not spec.tower_in_checkpoint


def _target(
    tensors: dict[str, StoredTensor],
    parameter: str,
    rules: Rules,
    path: Path,
    spec: CheckpointSpec,
    shape: tuple[int, ...] | None = None,
) -> tuple[str, StoredTensor]:
    """What an adapter adds to, by our name."""
    name = our_name(parameter, rules) or ""
    target = tensors.get(name)
    if target is None or (shape is not None and target.shape != shape):
        have = "which is not there" if target is None else f"which is {target.shape} there, not {shape}"
        base = spec.base.name if spec.base else "the base"
        raise CheckpointError(
            f"{path.name} adds to {parameter.removesuffix('.weight')} of {base}, {have}: it was trained on another "
            "base. Name that one with model_base (--model-base)."
        )
    return name, target


def _renamed(files: Iterable[Path], rules: Rules) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_file(file).values():
            ours = our_name(tensor.name, rules)
            if ours is None:
                continue
            if ours in tensors:
                raise CheckpointError(
                    f"{tensor.name} in {file.name} is also {tensors[ours].name} in {tensors[ours].file.name}; "
                    "remove the wrong file."
                )
            tensors[ours] = tensor
    return tensors


def read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: damaged, no weights file, a pickle with code (which does not run), or with an empty tensor.
    """
    try:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} in {path.parent} holds more than tensors, or is damaged. It is refused, and nothing in it "
            "was run; save its tensors as safetensors."
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing in {path.parent}; copy it there.") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} in {path.parent} is damaged or cut off; download it again.") from error
    if empty := [tensor.name for tensor in tensors.values() if 0 in tensor.shape]:
        raise CheckpointError(
            f"{empty[0]} in {path} is empty, as {len(empty)} of its {len(tensors)} tensors are: DeepSpeed (ZeRO-3) has "
            f"saved it without gathering it. Make the weights from its {training_step(path.parent) or 'global_step'} "
            "folder with its zero_to_fp32.py."
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    file: Any = safe_open(path, "pt")
    names = list(file.keys())
    return {
        name: StoredTensor(path, name, tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
        for name in names
    }


def _read_bin(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch's older format cannot be mapped
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path.name} in {path.parent} holds no dictionary of tensors: it is no weights file.")
    return {name: StoredTensor(path, name, tuple(value.shape), value.detach) for name, value in tensors.items()}
