"""Copies between the CPU and a device that wait as little as they can."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. It is copied from pinned memory: from any other, CUDA waits for the copy, and
    so for all that is queued before it."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def fill(target: torch.Tensor, host: torch.Tensor) -> None:
    """Copies a tensor of the CPU into one of the device, as `to_device` does."""
    target.copy_(host if target.device.type == "cpu" else host.pin_memory(), non_blocking=True)


class HostCopy:
    """Copies tensors of one device to the CPU, as one, so that a GPU is waited for once: in `values`, until the copy is
    made. What is queued behind the copy is not waited for.

    Integers stay integers where all parts hold integers or flags. Else all are float64: exact for float32, flags, and
    integers below 2**53.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        dtype = torch.float64 if any(part.is_floating_point() for part in parts) else torch.int64
        self._sizes = [part.numel() for part in parts]
        self._joined = torch.cat([part.to(dtype).flatten() for part in parts])
        self._copied: torch.cuda.Event | None = None
        if self._joined.device.type == "cuda":
            pinned = torch.empty_like(self._joined, device="cpu", pin_memory=True)
            stream = torch.cuda.current_stream(self._joined.device)
            self._joined = pinned.copy_(self._joined, non_blocking=True)
            self._copied = stream.record_event()

    def values(self) -> list[list[float]]:
        """Those of each tensor, flattened."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._joined.cpu().tolist()
        ends = accumulate(self._sizes)
        return [values[end - size : end] for end, size in zip(ends, self._sizes, strict=True)]


def to_host(parts: Sequence[torch.Tensor]) -> list[list[float]]:
    """The values of several tensors of one device, each flattened: see `HostCopy`."""
    return HostCopy(parts).values()
