"""Runs work of one sequence so that a failure can fail its request only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_DEVICE_ERRORS = ("CUDA error: ", "cuDNN error: ")
"""How a RuntimeError begins that torch raises for cuBLAS and cuDNN; they have no class of their own."""


def attempt(work: Callable[[], T]) -> T | Exception:
    """The result of the work, or the exception that it raises.

    Raises:
        OutOfMemoryError, AcceleratorError, MemoryError, and RuntimeError of CUDA's libraries: they concern all
            sequences of the device, whichever raises them first.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error).startswith(_DEVICE_ERRORS):
            raise
        return error
