"""Work for one sequence, whose failure is to be its request's alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """What the work gives, or the exception that it raises.

    Raises:
        OutOfMemoryError, AcceleratorError, MemoryError: they come from a device and concern all sequences, whichever
            meets them first.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:
        return error
