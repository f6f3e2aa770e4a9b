"""Attention of several tokens of a sequence in C++, for CPUs.

torch's own kernel reaches a tenth of the processor's speed in bfloat16 for the few hundred keys of a picture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from llava_serve.engine.executor.kernels.native_build import build, heads_of

_pointer, _number = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_pointer, _number, _number),
    *(_pointer, _pointer, _number),
    *[_pointer] * 3,
    *[_number] * 3,
    *(ctypes.c_float, _number, ctypes.c_int, ctypes.c_int),
)


def supports(head_dim: int) -> bool:
    """The code is for heads of this width."""
    return head_dim % 16 == 0


@cache
def _compiled(query: torch.dtype, stored: torch.dtype, head_dim: int, group: int) -> Callable[..., None]:
    library = build("native_prefill.cpp", **heads_of(query, stored, head_dim, group))
    function: Callable[..., None] = library.prefill_attention
    function.argtypes, function.restype = _ARGUMENTS, None  # type: ignore[attr-defined]
    return function


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """See `twins.prefill_attention`.

    Raises:
        RuntimeError, OSError: the code cannot be compiled here, or not be loaded.
    """
    heads, tokens, head_dim = query.shape
    kv_heads, count, _ = keys.shape
    assert query.stride(2) == 1, "a head's numbers are neighbours"
    assert keys.stride(1) == values.stride(1) == head_dim, "and so are a head's keys"
    out = query.new_empty(tokens, heads, head_dim)
    _compiled(query.dtype, keys.dtype, head_dim, heads // kv_heads)(
        query.data_ptr(),
        query.stride(1),
        query.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        None if slopes is None else slopes.data_ptr(),
        None if scales is None else scales.data_ptr(),
        out.data_ptr(),
        tokens,
        count,
        kv_heads,
        head_dim**-0.5 if scaling is None else scaling,
        window or 0,
        causal,
        torch.get_num_threads(),
    )
    return out
