"""Builds an engine from options: opens the checkpoint, chooses device and precision, loads the weights."""

from __future__ import annotations

import re

import torch

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions, ModelOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.kv_memory import CPU_BYTES
from llava_serve.engine.executor.packed_linear import pack_linears
from llava_serve.errors import CheckpointError
from llava_serve.model.container import available_cores
from llava_serve.model.llava import Llava


def build_engine(model: ModelOptions, engine: EngineOptions) -> Engine:
    """Loads the model and sizes its KV cache.

    Raises:
        CheckpointError: the model cannot be loaded, or its device is not there.
    """
    device = resolve_device(model.device)
    if device.type == "cpu":
        torch.set_num_threads(engine.num_threads or available_cores())
    spec = open_checkpoint(model)
    spec = spec.limited_to(engine.max_model_len)
    dtype = resolve_dtype(model.dtype, device, spec.torch_dtype, quantized=spec.quantization is not None)
    kv_cache_bytes = engine.kv_cache_bytes or (CPU_BYTES if device.type == "cpu" else 0)  # CUDA's takes what is left
    llava = Llava.load(spec, device, dtype, model.quantization, kv_cache_bytes=kv_cache_bytes)
    if device.type == "cpu":
        pack_linears(llava)
    return Engine(llava, engine)


def resolve_device(asked: str) -> torch.device:
    """`auto` is CUDA where there is a device.

    Raises:
        CheckpointError: it is not the name of one device, or torch does not find the device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", asked):
        raise CheckpointError(
            f"device is auto, cpu, cuda or cuda:N, and {asked[:100]!r} is none of them. An engine runs on one device; "
            "further devices take further replicas."
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(asked if asked != "auto" else "cuda" if found else "cpu")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise CheckpointError(f"There is no device {asked} (CUDA devices that torch finds: {found}); choose cpu.")
    return device


def device_name(device: torch.device) -> str:
    """`cpu`, or `cuda:0` and the GPU's name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def resolve_dtype(asked: str, device: torch.device, declared: str, *, quantized: bool = False) -> torch.dtype:
    """`auto` is float32 on a CPU, and on CUDA the checkpoint's own half precision, else bfloat16. With weights that are
    quantized in the files it is the checkpoint's own precision everywhere: their layers were made for it."""
    if asked == "auto" and quantized and declared in ("float32", "float16", "bfloat16"):
        asked = declared
    elif asked == "auto":
        half = declared if declared in ("float16", "bfloat16") else "bfloat16"
        asked = "float32" if device.type == "cpu" else half
    dtype: torch.dtype = getattr(torch, asked)
    return dtype
