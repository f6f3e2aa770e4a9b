"""Puts stored tensors into a model that was built without memory, one by one; quantizes on the way where asked."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from llava_serve.checkpoints.weights import StoredTensor
from llava_serve.errors import CheckpointError

Quantization = Literal["8bit", "4bit"]

_LISTED = 8
"""Names that an error message lists."""


def place_tensors(model: nn.Module, stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype) -> None:
    """Fills every parameter of a model from its stored tensor, and nothing else.

    Never holds more than one tensor beside the model: what a process needs to load is what the model takes.

    Raises:
        CheckpointError: lists the tensors that are missing, surplus, or of another shape.
    """
    tied = _tied_names(model)
    wanted = {name: parameter for name, parameter in model.named_parameters() if name not in tied}
    _check_names(wanted.keys(), stored, tied)
    for name, parameter in wanted.items():
        value = _read(name, stored[name], tuple(parameter.shape))
        module = model.get_submodule(name.rpartition(".")[0])
        _set(module, name.rpartition(".")[2], value, device, dtype)
    for module in model.modules():  # tables such as the rotary frequencies: computed, not stored
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    if tied:
        language_model: Any = model.get_submodule("language_model")
        language_model.tie_weights()


def quantize_layers(language_model: nn.Module, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replaces the linear layers of a language model, its head apart, by bitsandbytes' in 8 or 4 bits.

    Raises:
        CheckpointError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    except ImportError as error:
        raise CheckpointError(
            "8-bit and 4-bit loading need bitsandbytes: pip install llava-serve[quantization]."
        ) from error
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        )
    )
    replace_with_bnb_linear(language_model, modules_to_not_convert=["lm_head"], quantization_config=config)


def _tied_names(model: nn.Module) -> set[str]:
    """Parameters that share another's memory; files may or may not hold them."""
    language_model: Any = model.get_submodule("language_model")
    if not language_model.config.get_text_config().tie_word_embeddings:
        return set()
    return {f"language_model.{name}" for name in language_model.all_tied_weights_keys}


def _check_names(wanted: Any, stored: dict[str, StoredTensor], tied: set[str]) -> None:
    missing = sorted(set(wanted) - stored.keys())
    surplus = sorted(stored.keys() - set(wanted) - tied)
    if missing or surplus:
        files = ", ".join(sorted({stored[name].file.name for name in surplus}))
        parts = [f"{len(missing)} tensors are missing: {_some(missing)}"] if missing else []
        parts += (
            [f"{len(surplus)} tensors have no place in the model: {_some(surplus)} (in {files})"] if surplus else []
        )
        raise CheckpointError(f"The checkpoint does not fit its config.json. {'; '.join(parts)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _read(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> Tensor:
    value = stored.read()
    if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")) and stored.shape[0] > shape[0]:
        value = value[: shape[0]]  # rows behind the tokenizer's vocabulary
    if tuple(value.shape) != shape:
        raise CheckpointError(f"{name} in {stored.file.name} is {tuple(value.shape)}; config.json asks for {shape}.")
    return value if stored.delta is None else stored.delta.add_to(value)


def _set(module: nn.Module, name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    old = getattr(module, name)
    if type(old) is nn.Parameter:
        placed = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
        setattr(module, name, nn.Parameter(placed, requires_grad=False))
        return
    # bitsandbytes' parameters quantize themselves when they are moved to their device.
    kept = {key: item for key, item in old.__dict__.items() if key not in ("CB", "SCB")}
    half = torch.float16 if "has_fp16_weights" in kept else dtype
    setattr(module, name, type(old)(value.to(half), requires_grad=False, **kept).to(device))
