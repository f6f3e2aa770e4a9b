"""NaN and infinity: the check for them, and the error that reports them."""

from __future__ import annotations

import torch

from llava_serve.errors import NumericalError

_INF = float("inf")


def are_finite(values: torch.Tensor, dim: int | tuple[int, ...] = ()) -> torch.Tensor:
    """Whether no value is NaN or infinity.

    Two reductions without a copy: several times as fast as `isfinite().all()`, without temporary memory.

    Args:
        values: of any shape, but not empty along `dim`.
        dim: dimensions that are reduced; all by default.

    Returns:
        Bool tensor of the other dimensions, on the same device.
    """
    return (values.amin(dim) > -_INF) & (values.amax(dim) < _INF)  # reductions propagate NaN, and it compares false


def numerical_error(dtype: torch.dtype, *, float8: bool = False) -> NumericalError:
    """The error of a request that got NaN or infinity in a model of this precision, `float8` with such a KV cache."""
    advice = {
        torch.float16: "with dtype bfloat16 or float32 they may be",
        torch.bfloat16: "with dtype float32 they may be, unless its weights are damaged",
    }.get(dtype, "its weights may be damaged")
    if float8:
        advice = "with kv_cache_dtype auto they may be"
    name = str(dtype).removeprefix("torch.")
    return NumericalError(f"The model's numbers are not finite in {name} on this request; {advice}.")
