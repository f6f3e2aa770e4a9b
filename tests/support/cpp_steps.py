"""What tests of steps in C++ need of a machine."""

from __future__ import annotations

import pytest
import torch

from llava_serve.engine.executor.kernels import native_build
from llava_serve.engine.executor.packed_linear import PackedLinear


def _missing() -> str:
    """What such steps lack here; empty if nothing."""
    if native_build.compiler() is None:
        return "there is no C++ compiler"
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or not PackedLinear([torch.nn.Linear(64, 64)]).block:
        return "oneDNN is not there, or has another layout on this processor"
    return ""


MISSING = _missing()
NEEDS_CPP_STEPS = pytest.mark.skipif(bool(MISSING), reason=MISSING)
