"""Weights that are quantized in the files: what config.json says of them. Its reader needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_serve.config import ModelOptions
from llava_serve.errors import CheckpointError

METHODS = ("bitsandbytes", "compressed-tensors", "awq", "gptq")
"""transformers' names of the quantizers that are supported."""


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How the weights in the files are quantized.

    Attributes:
        method: one of `METHODS`.
        detail: the bits or the format, as config.json has it.
    """

    method: str
    detail: str

    def __str__(self) -> str:
        return f"{self.method}, {self.detail}"


def read_quantization(
    config: dict[str, Any], folder: Path, options: ModelOptions, *, original: bool
) -> StoredQuantization | None:
    """How the weights of a folder are quantized; None where they are not.

    Args:
        config: its config.json.
        folder: that holds the weights.
        options: what was asked for.
        original: the layout is the original's.

    Raises:
        CheckpointError: they are, in a way that is not supported, or beside an option that needs plain weights.
    """
    settings = config.get("quantization_config")
    if config.get("quantization"):
        raise CheckpointError(
            f"config.json in {folder} has `quantization`: the weights are MLX's, which are not supported. Use the "
            "original ones, and --load-4bit."
        )
    if not settings:
        if (folder / "quant_config.json").is_file():
            raise CheckpointError(
                f"{folder} holds quant_config.json, and config.json has no quantization_config: the weights are AWQ's "
                "in the files of 2023, which are not supported. Use the original ones, and --load-4bit."
            )
        return None
    if original:
        raise CheckpointError(
            f"config.json in {folder} has a quantization_config, and the layout is the original's: quantized weights "
            "load in transformers' layout only. Use the original weights, and --load-8bit or --load-4bit."
        )
    quantization = _read(settings, folder)
    if options.quantization is not None:
        raise CheckpointError(
            f"The weights in {folder} are quantized already ({quantization}); leave --load-8bit, --load-4bit and "
            "--load-fp8 (quantization) out."
        )
    if (folder / "adapter_config.json").is_file() or options.model_base is not None:
        raise CheckpointError(
            f"The weights in {folder} are quantized ({quantization}), and an adapter merges into plain ones: name the "
            "base that it was quantized from with model_base (--model-base), or remove the adapter's files."
        )
    return quantization


def _read(settings: dict[str, Any], folder: Path) -> StoredQuantization:
    by_bits = {4: settings.get("load_in_4bit"), 8: settings.get("load_in_8bit")}
    bits = next((bits for bits, is_set in by_bits.items() if is_set), settings.get("bits"))
    method = settings.get("quant_method") or ("bitsandbytes" if any(by_bits.values()) else None)
    if method not in METHODS:
        raise CheckpointError(
            f"config.json in {folder} says that the weights are quantized by {str(method)[:100]!r}; supported are "
            f"{', '.join(METHODS)}. Use the original weights, and --load-8bit or --load-4bit."
        )
    if method != "compressed-tensors":
        return StoredQuantization(method, f"{bits} bit")
    form = str(settings.get("format"))[:100]
    if form != "float-quantized":
        raise CheckpointError(
            f"config.json in {folder} says that the weights are compressed-tensors' {form!r}; its FP8 "
            "(float-quantized) is supported. Use the original weights, and --load-8bit or --load-4bit."
        )
    return StoredQuantization(method, "FP8")
