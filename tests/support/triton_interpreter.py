"""Triton's interpreter, which runs kernels on a CPU one program after another, and memory that shows a wrong access.

The interpreter keeps bfloat16 and 8-bit floats as their bits: there it multiplies matrices of bits, rounds otherwise
than a GPU, and computes sums and products of bits without a word. The first two are put right here; the third is
refused: kernels compute in float32.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from llava_serve.engine.executor.float8_cache import bits

GUARD = 64
"""Elements around each tensor."""


def require_interpreter() -> None:
    """Skips the module that calls it where its kernels would not be interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: `make test-kernels` installs it", allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides for a kernel when its module is imported
        pytest.skip("TRITON_INTERPRET is not 1: `make test-kernels` sets it", allow_module_level=True)
    _support_short_floats()


def _support_short_floats() -> None:
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast: Callable[..., Any] = InterpreterBuilder.cast_impl
    plain_conversion: Callable[..., Any] = InterpreterBuilder.create_fp_to_fp
    plain_operation: Callable[..., Any] = InterpreterBuilder.binary_op
    kinds = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
    kinds[tl.float8e4nv] = torch.float8_e4m3fn
    stored = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8}

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.bfloat16).float().numpy()

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return plain_cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        one, other = source.dtype.scalar, target.scalar
        if tl.float8e4nv not in (one, other):
            return plain_conversion(self, source, target, rounding)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).view(kinds[one]).to(kinds[other])
        return TensorHandle(values.view(stored.get(other, kinds[other])).numpy().reshape(source.data.shape), other)

    def dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        product = np.matmul(numbers(a), numbers(b), dtype=total.data.dtype)
        return TensorHandle(product + total.data, total.dtype.scalar)

    def operation(self: Any, left: Any, right: Any, function: Any) -> Any:
        assert not stored.keys() & {left.dtype.scalar, right.dtype.scalar}, "a kernel computes with few bits"
        return plain_operation(self, left, right, function)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.binary_op = operation


class GuardedMemory(TorchFunctionMode):
    """Tensors that a kernel's launcher makes, and those that it gets, lie between values that nothing may touch.

    What is read from there is NaN, or a number that no result survives; what is written there is found at the end.
    What is not written at all is NaN, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.place(result, copied=False) if func in (torch.empty, torch.empty_like) else result

    def place(self, tensor: Any, *, copied: bool = True) -> Any:
        """The tensor's values, or none, between guards. Strides are kept; what is no tensor is returned as it is."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        buffer = torch.full((span + 2 * GUARD,), self._canary(tensor.dtype), dtype=tensor.dtype)
        self._buffers.append((buffer, span))
        placed = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
        return placed.copy_(tensor) if copied else placed

    def check(self) -> None:
        """Nothing was written between the tensors."""
        for buffer, span in self._buffers:
            expected = torch.full_like(buffer[:GUARD], self._canary(buffer.dtype))
            for guard in (buffer[:GUARD], buffer[GUARD + span :]):
                torch.testing.assert_close(bits(guard), bits(expected), rtol=0, atol=0, equal_nan=True)

    @staticmethod
    def _canary(dtype: torch.dtype) -> float:
        return float("nan") if dtype.is_floating_point else 0x7EADBEEF
