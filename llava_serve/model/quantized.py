"""Loads weights that are quantized in the files, by transformers' own quantizers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_serve.checkpoints.files import weight_files
from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.checkpoints.weights import stored_tensors
from llava_serve.errors import CheckpointError
from llava_serve.model.numerics import are_finite
from llava_serve.model.weight_loader import check_names, listed, quiet_bitsandbytes, tied_names, weight_bytes

_PACKAGES = {
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "awq": ("gptqmodel",),
    "gptq": ("optimum", "gptqmodel"),
}
"""The modules that transformers' quantizers import."""
_KEPT = {
    "bitsandbytes": ("llm_int8_skip_modules", ("weight.absmax", "SCB")),
    "compressed-tensors": ("ignore", ("weight_scale",)),
}
"""Where a quantizer's settings list the modules that it leaves as they are, and the tensors which only the others
have."""
_HEAD = "language_model.lm_head"
_NAMES = (
    ("language_model.model.", "model.language_model."),
    (_HEAD, "lm_head"),
    ("projector.0", "model.multi_modal_projector.linear_1"),
    ("projector.2", "model.multi_modal_projector.linear_2"),
    ("vision_tower.", "model.vision_tower."),
)
"""How our names of modules begin, and transformers'."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SIZES = {"I64": 8, "I32": 4, "I16": 2}
"""Names of types in safetensors: of floating-point numbers that become the model's, and bytes of others, else one."""

_FAILURES = (ImportError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, AssertionError)
"""What transformers and the quantizers raise for files that they cannot load."""
_PACKED_OUTPUTS = 32
"""Output features that bitsandbytes packs together."""


def check_files(model: nn.Module, spec: CheckpointSpec) -> None:
    """Looks for what transformers would not name: it fails to fill packed weights that are missing.

    Args:
        model: without quantization, on the meta device.
        spec: of the checkpoint.

    Raises:
        CheckpointError: a file is damaged or no safetensors; a tensor is missing.
    """
    stored = {name.replace(".qweight", ".weight"): tensor for name, tensor in stored_tensors(spec).items()}
    for tensor in stored.values():
        if tensor.file.suffix != ".safetensors":
            raise CheckpointError(f"Quantized weights load from safetensors only; {spec.path} has {tensor.file.name}.")
    tied = tied_names(model)
    wanted = {name for name, _ in model.named_parameters()} - tied
    check_names(wanted, {name: tensor for name, tensor in stored.items() if name in wanted}, tied, spec)


def quantized_bytes(model: nn.Module, spec: CheckpointSpec, dtype: torch.dtype) -> int:
    """Bytes of the weights once they are loaded: as in the files, but for floating-point ones, which get `dtype`.

    compressed-tensors unpacks FP8 to `dtype` before the first answer, and rounds only what it multiplies.

    Args:
        model: without quantization, on the meta device.
        spec: of the checkpoint.
        dtype: of all weights that are not quantized.
    """
    unpacked = spec.quantization is not None and spec.quantization.method == "compressed-tensors"
    return weight_bytes(model, dtype) if unpacked else sum(_bytes_of(file, dtype) for file in weight_files(spec.path))


def _bytes_of(file: Path, dtype: torch.dtype) -> int:
    stored: Any = safe_open(file, "pt")
    slices = [stored.get_slice(name) for name in stored.keys()]  # noqa: SIM118  # it is no dictionary
    sizes = _SIZES | dict.fromkeys(_FLOATS, dtype.itemsize)
    return sum(torch.Size(one.get_shape()).numel() * sizes.get(one.get_dtype(), 1) for one in slices)


def load_quantized(model: Any, spec: CheckpointSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Loads the checkpoint as one of transformers' models, whose modules take the place of those of a `Llava`.

    Args:
        model: the `Llava`, on the meta device.
        spec: of a checkpoint in transformers' layout with a `quantization`.
        device: where the model runs.
        dtype: of all weights that are not quantized.

    Raises:
        CheckpointError: a package is not installed; a tensor is surplus, of the wrong shape or not finite;
            transformers cannot load the files.
    """
    whole = _from_pretrained(spec, device, dtype)
    inner, language_model = whole.model, model.language_model
    projector = inner.multi_modal_projector
    model.vision_tower = inner.vision_tower
    del inner.vision_tower.encoder.layers[model.vision_tower_layers :]
    model.projector_norm = getattr(projector, "projector_layernorm", None)
    model.projector = nn.Sequential(projector.linear_1, projector.act, projector.linear_2)
    model.image_newline = getattr(inner, "image_newline", None)
    language_model.config = inner.language_model.config  # which its layers read
    setattr(language_model, language_model.base_model_prefix, inner.language_model)
    language_model.set_output_embeddings(whole.lm_head)
    _set_dtype(model, dtype)
    _check_finite(model.named_parameters(), spec)


@torch.inference_mode()
def _from_pretrained(spec: CheckpointSpec, device: torch.device, dtype: torch.dtype) -> Any:
    quantization = spec.quantization
    assert quantization is not None
    absent = [name for name in _PACKAGES[quantization.method] if importlib.util.find_spec(name) is None]
    if absent:
        raise _needs(absent, spec)
    quiet_bitsandbytes()
    try:
        whole, report = AutoModelForImageTextToText.from_pretrained(
            spec.path,
            config=_config(spec, quantization.method),
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported
            use_safetensors=True,
            local_files_only=True,
        )
        _refuse_other_tensors(report, spec)
        _keep_unpacked(whole)
        whole(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # the first call unpacks FP8
    except torch.OutOfMemoryError:
        raise
    except ModuleNotFoundError as error:  # that one of the packages imports: GPTQModel does not declare torchvision
        raise _needs([str(error.name)], spec) from error
    except _FAILURES as error:
        raise CheckpointError(
            f"transformers cannot load the quantized weights of {spec.path} ({quantization}): a file is damaged or "
            "does not fit its config.json, or this machine cannot compute them."
        ) from error
    if quantization.method == "compressed-tensors":
        _remove_dispatch(whole)
    return whole


def _config(spec: CheckpointSpec, method: str) -> Any:
    """The config, with the layers that are plain in the files: its own list has the names that they had in the release
    that wrote it."""
    config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
    if method not in _KEPT:
        return config
    key, marks = _KEPT[method]
    stored = stored_tensors(spec)
    files: dict[Path, Any] = {file: safe_open(file, "pt") for file in {tensor.file for tensor in stored.values()}}
    layers = {
        name.removesuffix(".weight"): files[tensor.file].get_slice(tensor.name).get_dtype() in _FLOATS
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    quantized = {name for name in layers if any(f"{name}.{mark}" in stored for mark in marks)}
    plain = {name for name, has_floats in layers.items() if has_floats and name not in quantized}
    if quantized:
        plain |= {_HEAD} - layers.keys()  # a tied one is in no file
        config.quantization_config[key] = sorted(map(_transformers_name, plain))
    return config


def _transformers_name(ours: str) -> str:
    start, theirs = next((each for each in _NAMES if ours.startswith(each[0])), ("", ""))
    return theirs + ours.removeprefix(start)


def _needs(modules: Iterable[str], spec: CheckpointSpec) -> CheckpointError:
    packages = " and ".join(name.replace("_", "-") for name in modules)
    return CheckpointError(
        f"The weights of {spec.name} are quantized ({spec.quantization}), which needs {packages}; install it, or use "
        "the original weights and --load-8bit or --load-4bit."
    )


def _refuse_other_tensors(report: Mapping[str, Iterable[Any]], spec: CheckpointSpec) -> None:
    """Raises `CheckpointError` where transformers reports tensors that do not fit the model."""
    words = {"missing_keys": "missing", "unexpected_keys": "surplus", "mismatched_keys": "of another shape"}
    parts = [
        f"{word} are {listed(sorted(name if isinstance(name, str) else name[0] for name in report[key]))}"
        for key, word in words.items()
        if report[key]
    ]
    if parts:
        raise CheckpointError(
            f"The tensors of {spec.path} do not fit its config.json: {'; '.join(parts)}. Download it again, or correct "
            "its config.json."
        )


def _keep_unpacked(whole: Any) -> None:
    """bitsandbytes packs 4-bit weights for a CPU at the first call, and fails where a row is no whole number of blocks
    (SigLIP's 4304): such layers stay as they are."""
    for module in whole.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and (state.shape[0] % _PACKED_OUTPUTS or state.shape[1] % state.blocksize):
            module.support_avx512bf16_for_cpu = False


def _remove_dispatch(whole: nn.Module) -> None:
    """Removes what compressed-tensors puts around every module to move weights between devices: all are on one, and it
    copies the step that the engine passes. The layers that round their input keep their `forward`."""
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(whole, onload_tensors=True)
    for module in whole.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Some quantizers of transformers leave a part of the plain weights in the precision of the file."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)


def _check_finite(parameters: Iterable[tuple[str, nn.Parameter]], spec: CheckpointSpec) -> None:
    """Raises `CheckpointError` for NaN, infinity and weights that were not loaded: they spread to every answer."""
    for name, parameter in parameters:
        if parameter.is_meta or (parameter.is_floating_point() and not bool(are_finite(parameter))):
            raise CheckpointError(f"{name} of {spec.path} is not there, or holds NaN or infinity: download it again.")
