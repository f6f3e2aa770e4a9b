"""Decode attention in C++, for CPUs: all sequences of a step in one call, from the KV pool as it is.

torch's own kernel takes one sequence a call, and in bfloat16 it starts a matrix product for each head, of one row. The
code is compiled at its first use, in less than a second, for the processor that it runs on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from llava_serve.engine.executor.kernels.native_build import build, heads_of

_pointer, _number = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_pointer, _number, _number) * 3,
    *(_pointer, _pointer, _number),
    *(_pointer, _number, _pointer),
    *[_pointer] * 3,
    *(_number, _number, ctypes.c_float, _number, ctypes.c_int),
)
"""Of the function in C++."""


@cache
def compiled(query: torch.dtype, stored: torch.dtype, head_dim: int, group: int, page_size: int) -> Callable[..., None]:
    """The function in C++, for `launch`.

    Args:
        query, stored: of `TYPES`.
        group: query heads per kv head.

    Raises:
        RuntimeError, OSError: it cannot be compiled here, or not be loaded.
    """
    library = build("native_attention.cpp", **heads_of(query, stored, head_dim, group), PAGE_SIZE=page_size)
    function: Callable[..., None] = library.decode_attention
    function.argtypes, function.restype = _ARGUMENTS, None  # type: ignore[attr-defined]
    return function


def launch(
    function: Callable[..., None],
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    used: torch.Tensor,
    scaling: float | None,
    window: int | None,
    slopes: torch.Tensor | None,
    scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Calls what `compiled` returns. For what is not said here see `twins.decode_attention`.

    Args:
        query: [heads, tokens, head_dim]. The first tokens are those of the sequences, of which `used` says how many.
        new: their keys and values, [kv_heads, tokens, head_dim], which are written first, in a pool without `scales`.
        table, used, out: contiguous.
        out: [tokens, heads, head_dim], of which the first tokens are written.
    """
    key, value = new or (None, None)
    function(
        *_pointer_and_strides(query),
        *_pointer_and_strides(key),
        *_pointer_and_strides(value),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        table.data_ptr(),
        table.shape[1],
        used.data_ptr(),
        None if slopes is None else slopes.data_ptr(),
        None if scales is None else scales.data_ptr(),
        out.data_ptr(),
        len(used),
        len(keys),
        query.shape[2] ** -0.5 if scaling is None else scaling,
        window or 0,
        min(torch.get_num_threads(), len(used) * len(keys)),
    )


def _pointer_and_strides(tensor: torch.Tensor | None) -> tuple[int | None, int, int]:
    if tensor is None:
        return None, 0, 0
    heads, tokens, number = tensor.stride()
    assert number == 1, "a head's numbers are neighbours"
    return tensor.data_ptr(), tokens, heads


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    used: torch.Tensor,
    page_size: int,
    scaling: float | None,
    window: int | None,
    slopes: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """`twins.decode_attention`, for a trial."""
    function = compiled(query.dtype, keys.dtype, query.shape[2], query.shape[1] // len(keys), page_size)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    of_heads = query.transpose(0, 1)
    launch(function, of_heads, None, keys, values, table, used, scaling, window, slopes, scales, out)
    return out
