"""What stands between the matrix products of a layer, in Triton: see `twins` for what each computes.

Numbers are computed in float32, with roundings where torch's operations round, so that results are torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SILU_BLOCK = 1024


@triton.jit
def add_rmsnorm_kernel(delta, residual, weight, out, width, eps, has_delta: tl.constexpr, block: tl.constexpr):
    """A program per token."""
    dtype = out.dtype.element_ty
    offset = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, block)
    inside = at < width
    hidden = tl.load(residual + offset + at, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        hidden += tl.load(delta + offset + at, mask=inside, other=0.0).to(tl.float32)
        rounded = hidden.to(dtype)
        tl.store(residual + offset + at, rounded, mask=inside)
        hidden = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
    normed = (hidden * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset + at, (factor * normed).to(dtype), mask=inside)


def add_rmsnorm(delta: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `twins.add_rmsnorm`."""
    assert residual.is_contiguous(), "a token's numbers are neighbours"
    assert delta is None or delta.is_contiguous(), "a token's numbers are neighbours"
    tokens, width = residual.shape
    out = torch.empty_like(residual)
    add_rmsnorm_kernel[(tokens,)](
        residual if delta is None else delta, residual, weight, out, width, eps,
        has_delta=delta is not None, block=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def scaled_down(values, scale):
    """See `float8_cache.to_float8`. A GPU cuts off what is too large, so that is made NaN before."""
    scaled = values.to(tl.float32) / scale
    return tl.where(tl.abs(scaled) <= 448.0, scaled, float("nan"))


@triton.jit
def rotate_and_write_kernel(
    qkv, cos, sin, slots, query, keys, values, scales, qkv_stride, cos_stride, kv_head_stride, kv_stride,
    heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, has_scales: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program per token and head: of the queries, then the keys, then the values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    at = tl.arange(0, block)
    inside = at < half
    source = qkv + token * qkv_stride + head * head_dim
    first = tl.load(source + at, mask=inside, other=0.0)
    second = tl.load(source + half + at, mask=inside, other=0.0)
    slot = tl.load(slots + token) * kv_stride
    if head < heads + kv_heads:
        dtype = qkv.dtype.element_ty
        c = tl.load(cos + token * cos_stride + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * cos_stride + at, mask=inside, other=0.0).to(tl.float32)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = ((x * c).to(dtype).to(tl.float32) - (y * s).to(dtype).to(tl.float32)).to(dtype)
        second = ((y * c).to(dtype).to(tl.float32) + (x * s).to(dtype).to(tl.float32)).to(dtype)
    if head < heads:
        rotated = query + (token * heads + head) * head_dim
        tl.store(rotated + at, first, mask=inside)
        tl.store(rotated + half + at, second, mask=inside)
    else:
        kv_head = (head - heads) % kv_heads
        target = values
        if head < heads + kv_heads:
            target = keys
        target += kv_head.to(tl.int64) * kv_head_stride + slot
        if has_scales:  # float32 [2, kv_heads]: keys come first, as in the grid
            scale = tl.load(scales + head - heads)
            tl.store(target + at, scaled_down(first, scale).to(keys.dtype.element_ty), mask=inside)
            tl.store(target + half + at, scaled_down(second, scale).to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(target + at, first, mask=inside)
            tl.store(target + half + at, second, mask=inside)


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """See `twins.rotate_and_write`."""
    assert keys.stride() == values.stride(), "both are halves of one memory"
    assert cos.stride() == sin.stride(), "both come from one table"
    assert all(part.stride(-1) == 1 for part in (qkv, cos, keys)), "a head's numbers are neighbours"
    tokens = len(qkv)
    kv_heads, _, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    rotate_and_write_kernel[(tokens, heads + 2 * kv_heads)](
        qkv, cos, sin, slots, query, keys, values, scales,
        qkv.stride(0), cos.stride(0), keys.stride(0), keys.stride(1),
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, has_scales=scales is not None,
        block=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return query


@triton.jit
def silu_mul_kernel(gate_up, out, width, block: tl.constexpr):
    """A program per token and block of the width."""
    dtype = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    gate = tl.load(gate_up + token * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + token * width + at, (activated * up).to(dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `twins.silu_mul`."""
    assert gate_up.is_contiguous(), "a token's numbers are neighbours"
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    silu_mul_kernel[(tokens, triton.cdiv(width, _SILU_BLOCK))](gate_up, out, width, block=_SILU_BLOCK, num_warps=4)
    return out
