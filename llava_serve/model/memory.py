"""Whether a model fits the memory of its device, said before its weights are read."""

from __future__ import annotations

import logging

import psutil
import torch

from llava_serve.checkpoints.files import gigabytes
from llava_serve.errors import CheckpointError
from llava_serve.model.container import CGROUP, container_memory

_log = logging.getLogger(__name__)


def check_memory(name: str, weights: int, beside: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a model whose weights alone do not fit the free memory.

    Args:
        name: of the model.
        weights: bytes of its weights, as they are kept.
        beside: bytes that the engine may come to need on top. If only these do not fit, a warning says so: the KV
            cache of a CPU takes memory as it fills.
        device: where the weights go.
        dtype: of them.

    Raises:
        CheckpointError: says how much is needed, how much is there, and what needs less.
    """
    free = free_memory(device)
    needed = f"{name} needs {gigabytes(weights)} for its weights in {str(dtype).removeprefix('torch.')}"
    if weights > free:
        raise CheckpointError(
            f"{needed}, and {device} has {gigabytes(free)} of free memory. One engine runs on one device; choose fewer "
            "bits (dtype: bfloat16, quantization: 8bit, 4bit or fp8), a smaller model, or a machine with more."
        )
    if weights + beside > free:
        _log.warning(
            "%s, and its KV cache may take %s; %s has %s of free memory: lower engine.kv_cache_bytes.",
            needed,
            gigabytes(beside),
            device,
            gigabytes(free),
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take: of a GPU's memory, or of the machine's within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, container_memory(CGROUP))
