"""Loads stored tensors one by one into a model on the meta device, and quantizes them where that is asked for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_serve.checkpoints.files import gigabytes, training_step
from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.checkpoints.stored_tensor import StoredTensor
from llava_serve.checkpoints.weight_mapping import stored_name
from llava_serve.config import Quantization
from llava_serve.errors import CheckpointError
from llava_serve.model.float8 import Float8Linear, replace_linears
from llava_serve.model.numerics import are_finite

_log = logging.getLogger(__name__)

_DELTA_NORM = 0.1
_LARGE = 500_000_000
"""Bytes of weights whose loading is shown."""
_LISTED = 8
"""The most names that an error message lists."""


def load_weights(
    model: nn.Module, stored: dict[str, StoredTensor], spec: CheckpointSpec, device: torch.device, dtype: torch.dtype
) -> None:
    """Loads every parameter of a model from its stored tensor.

    Never holds more than one tensor beside the model, so that loading needs no more memory than the model.

    Raises:
        CheckpointError: lists the tensors that are missing or surplus; names one of another shape, or that is not
            finite.
    """
    tied = tied_names(model)
    wanted = {name: parameter for name, parameter in model.named_parameters() if name not in tied}
    check_names(wanted.keys(), stored, tied | _stored_buffers(model), spec)
    _report_other_head(stored, tied)
    _make_room(model, wanted, device, dtype)
    with _progress_bar(sum(parameter.numel() for parameter in wanted.values()) * dtype.itemsize) as bar:
        for name, parameter in wanted.items():
            path, _, last = name.rpartition(".")
            _place(model.get_submodule(path), last, stored[name], tuple(parameter.shape), device, dtype)
            bar.update(parameter.numel() * dtype.itemsize)
    for path, module in model.named_modules():  # tables such as rotary frequencies: few are stored
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            if persistent and (tensor := stored.get(f"{path}.{name}")) is not None:
                buffer = _read(tensor, tuple(buffer.shape)).to(dtype)
            module.register_buffer(name, buffer.to(device), persistent=persistent)
    if tied:
        language_model: Any = model.get_submodule("language_model")
        language_model.tie_weights()


def _progress_bar(num_bytes: int) -> tqdm[None]:
    """On a terminal, for weights that take more than a moment; else a line in the log."""
    hidden = num_bytes < _LARGE or not sys.stderr.isatty()
    if hidden:
        _log.info("Loading %s of weights.", gigabytes(num_bytes))
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Loading weights", leave=False, disable=hidden)


def _stored_buffers(model: nn.Module) -> set[str]:
    """Buffers that files may hold, such as the constants of Apertus' activation."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's weights once they are loaded. The model is on the meta device."""
    tied = tied_names(model)
    each = (
        parameter.numel() * _bytes_each(parameter, dtype)
        for name, parameter in model.named_parameters()
        if name not in tied
    )
    return int(sum(each))


def _bytes_each(parameter: nn.Parameter, dtype: torch.dtype) -> float:
    kind = type(parameter).__name__  # bitsandbytes is imported only where it is used
    return {"Int8Params": 1.0, "Params4bit": 0.5, "Float8Weight": 1.0}.get(kind, float(dtype.itemsize))


def quantize_layers(
    language_model: nn.Module, quantization: Quantization, device: torch.device, dtype: torch.dtype
) -> None:
    """Replaces the linear layers of a language model, without its head. `load_weights` quantizes the weights while
    loading.

    Args:
        language_model: on the meta device.
        quantization: 8 bits (LLM.int8) or 4 bits (NF4 with double quantization) by bitsandbytes, as in the original, or
            8-bit floats.
        device: where the weights go.
        dtype: of the layers' inputs and outputs.

    Raises:
        CheckpointError: bitsandbytes is not installed, or cannot compute in this precision; or the GPU cannot.
    """
    if quantization == "fp8":
        replace_linears(language_model, device)
    else:
        _replace_by_bitsandbytes(language_model, quantization == "8bit", dtype)
    # The experts of a layer are one tensor, and no linear layers.
    if experts := sum(parameter.numel() for parameter in language_model.parameters() if parameter.ndim == 3):
        _log.warning(
            "The experts of this mixture are not quantized: they stay in %s and take %s. --load-%s saves memory in its "
            "other layers only.",
            str(dtype).removeprefix("torch."),
            gigabytes(experts * dtype.itemsize),
            quantization,
        )


def _replace_by_bitsandbytes(language_model: nn.Module, eight: bool, dtype: torch.dtype) -> None:
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    except ImportError as error:
        raise CheckpointError(
            "8-bit and 4-bit loading need bitsandbytes; install it: pip install llava-serve[quantization]."
        ) from error
    quiet_bitsandbytes()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError("8-bit and 4-bit layers compute in float32, bfloat16 or float16; choose one with dtype.")
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"
    )
    replace_with_bnb_linear(
        language_model,
        modules_to_not_convert=["lm_head"],
        quantization_config=BitsAndBytesConfig(load_in_8bit=True) if eight else four,
    )


def quiet_bitsandbytes() -> None:
    """Drops the warning that bitsandbytes logs for each 8-bit layer at each step."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_worth_logging)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # Logged for each layer at each step; it is known that 8-bit layers round their input.
    return "inputs will be cast" not in str(record.msg)


def tied_names(model: nn.Module) -> set[str]:
    """Parameters that are tied to another one; checkpoints may or may not hold them."""
    language_model: Any = model.get_submodule("language_model")
    if not language_model.config.get_text_config().tie_word_embeddings:
        return set()
    return {f"language_model.{name}" for name in language_model.all_tied_weights_keys}


def check_names(wanted: Iterable[str], stored: dict[str, StoredTensor], tied: set[str], spec: CheckpointSpec) -> None:
    """Raises `CheckpointError` for tensors that are wanted and not stored, or stored and neither wanted nor tied."""
    missing = sorted(set(wanted) - stored.keys())
    surplus = sorted(stored.keys() - set(wanted) - tied)
    if not missing and not surplus:
        return
    parts: list[str] = []
    if missing:
        parts.append(f"missing are {listed([stored_name(name, spec) for name in missing])}")
    if surplus:
        parts.append(f"surplus are {listed([_described(stored[name]) for name in surplus])}")
    advice = "Download it again, or correct its config.json."
    if any(name.endswith((".qweight", ".qzeros")) for name in surplus):
        advice = "The weights are quantized already, by AWQ or GPTQ: take the original ones, and --load-4bit."
    elif missing and (step := training_step(spec.base or spec.path)):
        advice = f"DeepSpeed's {step} holds all of them in parts: make the weights with its zero_to_fp32.py."
    elif missing == ["language_model.lm_head.weight"] and not surplus:
        advice = "If its head is its embeddings, as in small models, set tie_word_embeddings in config.json to true."
    elif spec.adapter is not None:
        advice = "Name the base that it was trained on with model_base (--model-base); "
        advice += f"{spec.base} is another, or incomplete."
    raise CheckpointError(f"The tensors of {spec.path} do not fit its config.json: {'; '.join(parts)}. {advice}")


def _report_other_head(stored: dict[str, StoredTensor], tied: set[str]) -> None:
    """Warns of a stored head that differs from the embeddings that it is tied to, and is not used."""
    for head in (stored[name] for name in tied if name in stored):
        if _differs_from_embeddings(head, stored):
            _log.warning(
                "%s differs from the embeddings and is not used: config.json ties the head to them "
                "(tie_word_embeddings).",
                _described(head),
            )


def untie_other_head(stored: dict[str, StoredTensor], text_config: Any) -> None:
    """Unties the head of a language model where the files hold another one than its embeddings, as transformers and
    PEFT do, and warns of it."""
    head = stored.get("language_model.lm_head.weight")
    if text_config.tie_word_embeddings and head is not None and _differs_from_embeddings(head, stored):
        _log.warning("%s differs from the embeddings and is used, though config.json ties them.", _described(head))
        text_config.tie_word_embeddings = False


def _differs_from_embeddings(head: StoredTensor, stored: dict[str, StoredTensor]) -> bool:
    embeddings = next((tensor for name, tensor in stored.items() if name.endswith("embed_tokens.weight")), None)
    return embeddings is None or head.shape != embeddings.shape or not torch.equal(head.value(), embeddings.value())


def refuse_delta(model: nn.Module, spec: CheckpointSpec) -> None:
    """Raises `CheckpointError` for differences to a model's weights: all of their norms are about 0. A whole model has
    small ones at most in its first layers."""
    norms = [weight for name, weight in model.named_parameters() if name.endswith("norm.weight")]
    if spec.layout == "original" and norms and all(bool((weight.abs() < _DELTA_NORM).all()) for weight in norms):
        raise CheckpointError(
            f"{spec.path} is a delta: its norms are about 0, so that it holds differences to LLaMA. Add LLaMA's "
            "weights to them with the original's apply_delta, and name the result."
        )


def _described(stored: StoredTensor) -> str:
    return f"{stored.name} (in {stored.file.name})"


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _make_room(model: nn.Module, names: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    """Replaces parameters on the meta device by empty ones, but for those that quantize themselves. All before the
    first tensor is read: what reading takes for a moment, between those that stay, would leave gaps in memory."""
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, last)
        if type(old) is nn.Parameter:
            empty = torch.empty(old.shape, dtype=dtype, device=device)
            setattr(module, last, nn.Parameter(empty, requires_grad=False))


def _place(
    module: nn.Module, name: str, stored: StoredTensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> None:
    value = _read(stored, shape)
    old = getattr(module, name)
    if type(old) is nn.Parameter:
        loaded = old.copy_(value)
    elif isinstance(module, Float8Linear):
        loaded = value
        module.set_weight(value, device)
    else:  # bitsandbytes' parameters quantize themselves when they are moved to their device.
        loaded = value.to(dtype)
        settings = {key: item for key, item in old.__dict__.items() if key not in ("CB", "SCB")}
        setattr(module, name, type(old)(loaded, requires_grad=False, **settings).to(device))
    _check_finite(stored, value, loaded)


def _read(stored: StoredTensor, shape: tuple[int, ...]) -> Tensor:
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.name} in {stored.file} is {stored.shape}, but config.json asks for {shape}: correct config.json, "
            "or take the weights that belong to it."
        )
    value = stored.value()
    if not value.is_floating_point():
        raise CheckpointError(
            f"{stored.name} in {stored.file} holds {value.dtype}: the weights are quantized already. Take the original "
            "ones; quantization is done while loading."
        )
    return value


def _check_finite(stored: StoredTensor, value: Tensor, loaded: Tensor) -> None:
    """Raises `CheckpointError` for a tensor with NaN or infinity: they spread to every answer."""
    if loaded.numel() == 0 or bool(are_finite(loaded)):
        return
    what = f"{stored.name} in {stored.file}" + (" with the adapter's addition" if stored.delta else "")
    if bool(are_finite(value)):
        dtype = str(loaded.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{what} holds numbers too large for {dtype}: choose bfloat16 or float32 with dtype (--dtype)."
        )
    raise CheckpointError(f"{what} holds NaN or infinity: download it again.")
