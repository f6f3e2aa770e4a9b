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

from torch import Tensor

from llava_serve.checkpoints.files import read_json
from llava_serve.errors import CheckpointError

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

_UNSUPPORTED_KEYS = (
    *("use_dora", "use_qalora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"),
    *("layer_replication", "target_parameters", "trainable_token_indices"),
)
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")

Stored = tuple[tuple[int, ...], Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adds to one weight: `scale * B @ A`.

    Attributes:
        shape: (out_features, in_features) of the weight.
        a, b: read the factors, [rank, in_features] and [out_features, rank].
        scale: alpha / rank, or alpha / sqrt(rank).
    """

    shape: tuple[int, int]
    a: Callable[[], Tensor]
    b: Callable[[], Tensor]
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """The merged weight. Factors, product and sum are each rounded to the precision of the stored weight, as PEFT
        does in the original, whose model is in half precision: rounding less gives other logits."""
        a, b = (factor().to(weight.dtype).float() for factor in (self.a, self.b))
        return weight + (self.scale * (b @ a)).to(weight.dtype)


def read_deltas(folder: Path, file: Path, stored: Mapping[str, Stored]) -> dict[str, Delta]:
    """Pairs the factors of an adapter.

    Args:
        folder: of the adapter, with `adapter_config.json`.
        file: that holds the tensors, for messages.
        stored: shape and reader of each tensor in it.

    Returns:
        By the module's name in the original's layout.

    Raises:
        CheckpointError: the adapter is no plain LoRA, or one of two factors is missing.
    """
    config = read_json(folder, "adapter_config.json")
    _refuse_unsupported(config)
    factors: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{file.name} holds {name}, which is no factor of a LoRA on a linear layer.")
        factors.setdefault(match["module"], {})[match["side"]] = tensor
    return {module: _delta(module, sides, config, file) for module, sides in factors.items()}


def _delta(module: str, sides: dict[str, Stored], config: dict[str, Any], file: Path) -> Delta:
    if sides.keys() != {"A", "B"}:
        raise CheckpointError(f"{file.name} holds only one of the two factors of {module}.")
    (shape_a, a), (shape_b, b) = sides["A"], sides["B"]
    rank = int(config["r"])
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
        raise CheckpointError(f"{file.name}: the factors of {module} are {shape_a} and {shape_b}; the rank is {rank}.")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Delta((shape_b[0], shape_a[1]), a, b, float(config["lora_alpha"]) / divisor)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"adapter_config.json is of type {config['peft_type']}; only LORA is supported.")
    for key in _UNSUPPORTED_KEYS:
        if config.get(key):
            raise CheckpointError(
                f"adapter_config.json sets {key}, which is not supported; merge the adapter with PEFT and load the "
                "result."
            )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"adapter_config.json sets init_lora_weights to {config['init_lora_weights']!r}: the adapter adds to a "
            "base that its initialization changed. Merge it with PEFT and load the result."
        )
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise CheckpointError(f"adapter_config.json lacks {key}; use the file that PEFT saved.")
