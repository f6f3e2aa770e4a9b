"""Copies between the CPU and a device that wait as little as they can."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. It is copied from pinned memory: from any other, CUDA waits for the copy, and
    so for all that is queued before it."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(parts: Sequence[torch.Tensor]) -> list[list[float]]:
    """The values of several tensors of one device, each flattened. They are copied as one, so a GPU is waited for once.

    Integers stay integers where all parts hold integers or flags. Else all are float64: exact for float32, flags, and
    integers below 2**53.
    """
    dtype = torch.float64 if any(part.is_floating_point() for part in parts) else torch.int64
    values: list[float] = torch.cat([part.to(dtype).flatten() for part in parts]).cpu().tolist()
    ends = [*accumulate(part.numel() for part in parts)]
    return [values[end - part.numel() : end] for part, end in zip(parts, ends, strict=True)]
