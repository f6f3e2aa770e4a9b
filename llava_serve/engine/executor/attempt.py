"""Runs work of one sequence so that a failure can fail its request only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """The result of the work, or the exception that it raises.

    Raises:
        OutOfMemoryError, AcceleratorError, MemoryError: they concern all sequences of the device, whichever
            raises them first.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:
        return error
