"""Decode attention in Triton: the keys of a sequence are split, so that a few sequences keep a GPU busy.

A first kernel attends to a share of a sequence's keys, with all query heads of a group at once, so that their keys and
values are read once; a second merges the shares. A sequence's result depends on no other one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PROGRAMS = 128
"""Wanted for a sequence: about the multiprocessors of a large GPU."""
_LEAST_SPLITS, _MOST_SPLITS = 4, 32
_TILE_BYTES = 16 << 10
"""Of a tile of keys: two stages of keys and values fit in shared memory several times."""
_MOST_TILE_KEYS = 64
_LEAST_DOT = 16
"""Smallest side of a matrix product in Triton."""


@triton.jit
def attend_kernel(
    query, keys, values, table, used, slopes, scales, partial, lse, scaling,
    query_stride, query_head_stride, kv_head_stride, kv_stride, table_stride,
    heads: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr, page_size: tl.constexpr, window: tl.constexpr,
    has_slopes: tl.constexpr, has_scales: tl.constexpr,
    block_heads: tl.constexpr, block_keys: tl.constexpr, block_dim: tl.constexpr,
):  # fmt: skip
    """A program per sequence, kv head and share of the keys. Shares are of whole tiles, so the last may be empty."""
    log2e: tl.constexpr = 1.4426950408889634
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    count = tl.load(used + sequence)
    first = 0
    if window > 0:
        first = tl.maximum(count - window, 0)
    share = tl.cdiv(tl.cdiv(count - first, splits), block_keys) * block_keys
    begin = first + split * share
    end = tl.minimum(begin + share, count)
    member = tl.arange(0, block_heads)
    head = kv_head * group + member
    grouped = member < group
    out = (sequence * heads + head) * splits + split
    if begin < end:
        dim = tl.arange(0, block_dim)
        inside = dim < head_dim
        chosen = grouped[:, None] & inside[None, :]
        queries = tl.load(
            query + sequence.to(tl.int64) * query_stride + head[:, None] * query_head_stride + dim[None, :],
            mask=chosen,
            other=0.0,
        )
        if has_slopes:
            slope = tl.load(slopes + head, mask=grouped, other=0.0)
        factor = scaling
        if has_scales:  # float32 [2, kv heads], of keys and values
            factor = scaling * tl.load(scales + kv_head)
        top = tl.full([block_heads], float("-inf"), tl.float32)
        total = tl.zeros([block_heads], tl.float32)
        result = tl.zeros([block_heads, block_dim], tl.float32)
        for at in range(begin, end, block_keys):
            position = at + tl.arange(0, block_keys)
            known = position < end
            page = tl.load(table + sequence.to(tl.int64) * table_stride + position // page_size, mask=known, other=0)
            slot = page.to(tl.int64) * page_size + position % page_size
            source = kv_head.to(tl.int64) * kv_head_stride + slot * kv_stride
            tile = tl.load(keys + source[None, :] + dim[:, None], mask=known[None, :] & inside[:, None], other=0.0)
            score = tl.dot(queries, tile.to(queries.dtype), input_precision="ieee") * factor
            if has_slopes:
                score += slope[:, None] * (position - count + 1)[None, :].to(tl.float32)
            score = tl.where(known[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2((score - new_top[:, None]) * log2e)
            faded = tl.exp2((top - new_top) * log2e)
            total = total * faded + tl.sum(weight, 1)
            tile = tl.load(values + source[:, None] + dim[None, :], mask=known[:, None] & inside[None, :], other=0.0)
            tile = tile.to(queries.dtype)
            result = result * faded[:, None] + tl.dot(weight.to(tile.dtype), tile, input_precision="ieee")
            top = new_top
        if has_scales:
            result *= tl.load(scales + tl.num_programs(1) + kv_head)
        tl.store(partial + out[:, None].to(tl.int64) * head_dim + dim[None, :], result / total[:, None], mask=chosen)
        tl.store(lse + out, top + tl.log(total), mask=grouped)
    else:
        tl.store(lse + out, tl.full([block_heads], float("-inf"), tl.float32), mask=grouped)


@triton.jit
def merge_kernel(
    partial, lse, out, heads: tl.constexpr, head_dim: tl.constexpr, splits: tl.constexpr, block_dim: tl.constexpr
):
    """A program per sequence and head. Of a share without keys nothing was written."""
    index = tl.program_id(0) * heads + tl.program_id(1)
    dim = tl.arange(0, block_dim)
    inside = dim < head_dim
    split = index * splits + tl.arange(0, splits)
    score = tl.load(lse + split)
    weight = tl.exp(score - tl.max(score, 0))
    weight = weight / tl.sum(weight, 0)
    part = tl.load(
        partial + split[:, None].to(tl.int64) * head_dim + dim[None, :],
        mask=(score > float("-inf"))[:, None] & inside[None, :],
        other=0.0,
    )
    result = tl.sum(part * weight[:, None], 0)
    tl.store(out + index.to(tl.int64) * head_dim + dim, result.to(out.dtype.element_ty), mask=inside)


def splits_of(kv_heads: int) -> int:
    """Shares into which a sequence's keys are split. They depend on the model only: results do not on the batch."""
    wanted: int = triton.next_power_of_2(_PROGRAMS // kv_heads)
    return max(_LEAST_SPLITS, min(_MOST_SPLITS, wanted))


def tile_keys(block_dim: int, itemsize: int, *, float8: bool = False) -> int:
    """Keys of a tile, by the bytes of a query's number: half as many 8-bit floats, which are converted in registers."""
    itemsize *= 1 + float8
    return max(_LEAST_DOT, min(_MOST_TILE_KEYS, _TILE_BYTES // (block_dim * itemsize)))


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
    """See `twins.decode_attention`."""
    assert keys.stride() == values.stride(), "both are halves of one memory"
    assert all(part.stride(-1) == 1 for part in (query, keys, table)), "a head's numbers are neighbours"
    sequences, heads, head_dim = query.shape
    kv_heads, device = len(keys), query.device
    group, splits = heads // kv_heads, splits_of(kv_heads)
    block_dim = max(_LEAST_DOT, triton.next_power_of_2(head_dim))
    partial = torch.empty(sequences, heads, splits, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=device)
    out = torch.empty(sequences, heads, head_dim, dtype=query.dtype, device=device)
    attend_kernel[(sequences, kv_heads, splits)](
        query, keys, values, table, used, slopes, scales, partial, lse, head_dim**-0.5 if scaling is None else scaling,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), table.stride(0),
        heads=heads, group=group, head_dim=head_dim, page_size=page_size, window=window or 0,
        has_slopes=slopes is not None, has_scales=scales is not None,
        block_heads=max(_LEAST_DOT, triton.next_power_of_2(group)),
        block_keys=tile_keys(block_dim, query.dtype.itemsize, float8=scales is not None),
        block_dim=block_dim, num_warps=4, num_stages=3,
    )  # fmt: skip
    merge_kernel[(sequences, heads)](
        partial, lse, out, heads=heads, head_dim=head_dim, splits=splits, block_dim=block_dim, num_warps=1
    )
    return out
