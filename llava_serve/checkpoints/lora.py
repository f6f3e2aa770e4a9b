"""Reads a PEFT LoRA adapter as additions to weights, so that it is merged tensor by tensor while they are loaded.

PEFT itself merges into a model that is in memory as a whole, hence never before quantizing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_serve.checkpoints.files import read_json
from llava_serve.errors import CheckpointError

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save)?(?:\.default)?(?:\.base_layer)?\.(?P<last>weight|bias)")
"""A head or embeddings with factors of their own are saved as a whole, too, as `base_layer`."""

_KNOWN_KEYS = frozenset(
    (
        *("peft_type", "task_type", "peft_version", "inference_mode", "auto_mapping", "revision", "runtime_config"),
        *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "ensure_weight_tying"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("trainable_token_indices", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
    )
)
"""Of adapter_config.json: those whose meaning the merge follows, or that do not matter to it. Any other one that is set
may change what the adapter adds."""
_KEEP_THE_BASE = (None, "true", "false", "gaussian", "eva", "orthogonal")
"""Initializations after which the base is what it was; others subtract from it what they put into the factors."""

_STRIP = 256
"""How many output features of a weight are added at once."""

Stored = tuple[tuple[int, ...], Callable[[], Tensor]]


class Scratch:
    """Memory for the product of two factors, which is used again for the next two: other memory for each, between the
    tensors of the model, would leave gaps there."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """`left @ right` of float32. It holds until the next call."""
        shape = len(left), right.shape[1]
        if math.prod(shape) > len(self._numbers):
            self._numbers = torch.empty(math.prod(shape))
        return torch.mm(left, right, out=self._numbers[: math.prod(shape)].view(shape))


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adds to one weight: `scale * B @ A`.

    Attributes:
        shape: (out_features, in_features) of the weight.
        a, b: read the factors, [rank, in_features] and [out_features, rank].
        scale: alpha / rank, or alpha / sqrt(rank).
        rounded: factors and product are rounded to the precision of the weight before they are added, as PEFT does in
            the original, whose adapter is in half precision as its model; else only the sum is rounded.
        scratch: of all of an adapter.
    """

    shape: tuple[int, int]
    a: Callable[[], Tensor]
    b: Callable[[], Tensor]
    scale: float
    rounded: bool
    scratch: Scratch

    def add_to(self, weight: Tensor) -> Tensor:
        """The merged weight, in the precision of the stored one. Rounding otherwise than PEFT gives other logits."""
        a, b = (factor().to(weight.dtype) if self.rounded else factor() for factor in (self.a, self.b))
        product = self.scratch.product(b.float(), a.float()).mul_(self.scale)
        merged = torch.empty_like(weight)
        # In strips: torch converts what it adds to another precision, and would do so with the whole tensor.
        for start in range(0, len(weight), _STRIP):
            strip = slice(start, start + _STRIP)
            added = product[strip].to(weight.dtype) if self.rounded else product[strip]
            merged[strip] = added.add_(weight[strip])
        return merged


@dataclass(frozen=True, slots=True)
class Adapter:
    """The tensors of an adapter, by the names of the modules that PEFT wrapped.

    Attributes:
        deltas: by module.
        saved: the name of each whole parameter that was trained (`modules_to_save`), by the parameter's name.
        tokens: the ids of the rows that were trained (`trainable_token_indices`) and the name of the tensor with those
            rows, by module.
    """

    deltas: dict[str, Delta]
    saved: dict[str, str]
    tokens: dict[str, tuple[tuple[int, ...], str]]


def read_adapter(folder: Path, file: Path, stored: Mapping[str, Stored], *, rounded: bool) -> Adapter:
    """Sorts the tensors of an adapter, and pairs the factors.

    Args:
        folder: of the adapter, with `adapter_config.json`.
        file: that holds the tensors, for messages.
        stored: shape and reader of each tensor in it.
        rounded: as `Delta` has it.

    Raises:
        CheckpointError: the adapter is no plain LoRA, or one of two factors is missing.
    """
    config = read_json(folder, "adapter_config.json")
    _refuse_unsupported(config)
    factors: dict[str, dict[str, Stored]] = {}
    saved: dict[str, str] = {}
    tokens: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, tensor in stored.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[match["side"]] = tensor
        elif match := _TOKENS.fullmatch(name):
            tokens[match["module"]] = (_token_ids(config, match["module"], tensor, file), name)
        elif (match := _SAVED.fullmatch(name)) and _is_saved(config, match["module"]):
            saved[f"{match['module']}.{match['last']}"] = name
        else:
            raise CheckpointError(
                f"{file.name} holds {name}, which is no factor of a LoRA on a linear layer and in none of "
                "modules_to_save of adapter_config.json. Merge the adapter with PEFT and load the result."
            )
    for whole in config.get("modules_to_save") or ():
        if not any(f".{whole}." in f".{name}" for name in saved):
            raise CheckpointError(
                f"adapter_config.json names {whole} in modules_to_save, but {file.name} does not hold it: use the "
                "files of one adapter."
            )
    scratch = Scratch()
    deltas = {module: _delta(module, sides, config, file, rounded, scratch) for module, sides in factors.items()}
    return Adapter(deltas, saved, tokens)


def _is_saved(config: dict[str, Any], module: str) -> bool:
    """Whether a module was trained as a whole. PEFT also saves embeddings and heads that were resized."""
    whole = (*(config.get("modules_to_save") or ()), "embed_tokens", "lm_head")
    return any(f".{part}." in f".{module}." for part in whole)


def _token_ids(config: dict[str, Any], module: str, tensor: Stored, file: Path) -> tuple[int, ...]:
    named = config.get("trainable_token_indices") or ()
    if isinstance(named, dict):
        named = next((ids for key, ids in named.items() if module.endswith(key)), ())
    ids = tuple(int(token_id) for token_id in named)
    if len(ids) != tensor[0][0]:
        raise CheckpointError(
            f"{file.name} holds {tensor[0][0]} rows of {module}, but adapter_config.json names {len(ids)} "
            "(trainable_token_indices): use the files of one adapter."
        )
    return ids


def _delta(
    module: str, sides: dict[str, Stored], config: dict[str, Any], file: Path, rounded: bool, scratch: Scratch
) -> Delta:
    if sides.keys() != {"A", "B"}:
        raise CheckpointError(f"{file.name} holds only one of the two factors of {module}.")
    (shape_a, a), (shape_b, b) = sides["A"], sides["B"]
    rank = int(config["r"])
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
        raise CheckpointError(f"{file.name}: the factors of {module} are {shape_a} and {shape_b}; the rank is {rank}.")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Delta((shape_b[0], shape_a[1]), a, b, float(config["lora_alpha"]) / divisor, rounded, scratch)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"adapter_config.json is of type {config['peft_type']}; only LORA is supported.")
    for key in sorted(config.keys() - _KNOWN_KEYS):
        if config[key]:
            raise CheckpointError(
                f"adapter_config.json sets {key}, which is not supported; merge the adapter with PEFT and load the "
                "result."
            )
    initialization = config.get("init_lora_weights")
    if (initialization if initialization is None else str(initialization).lower()) not in _KEEP_THE_BASE:
        raise CheckpointError(
            f"adapter_config.json sets init_lora_weights to {initialization!r}: the adapter may add to a base "
            "that its initialization changed. Merge it with PEFT and load the result."
        )
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise CheckpointError(f"adapter_config.json lacks {key}; use the file that PEFT saved.")
