"""The kernels' twins in plain torch: the same signatures and the same roundings, on any device and in any precision.

They are what a kernel is compared with, and what runs where it cannot.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from llava_serve.engine.executor.float8_cache import load, store


def add_rmsnorm(delta: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds `delta` to the residual stream in place, and normalises the sum by its root mean square.

    The norm is computed in float32, as transformers does it, whatever the precision is.

    Args:
        delta: [tokens, hidden]; None adds nothing.
        residual: [tokens, hidden].
        weight: [hidden].

    Returns:
        [tokens, hidden].
    """
    if delta is not None:
        residual += delta
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(residual.dtype)


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """Applies rotary embeddings to queries and keys, and writes keys and values into the KV pool.

    Args:
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys and values side by side.
        cos, sin: [tokens, head_dim]; both halves are equal.
        slots: int64 [tokens], positions of the KV pool.
        keys, values: a layer of the KV pool, [kv_heads, positions, head_dim].
        scales: float32 [2, kv_heads], of keys and values in 8-bit floats; None where they have the precision of `qkv`.

    Returns:
        The queries [tokens, heads, head_dim].
    """
    kv_heads, _, head_dim = keys.shape
    parts = qkv.view(len(qkv), -1, head_dim)
    query, key, value = torch.split_with_sizes(parts, [parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos[:, None], sin[:, None]
    of_keys, of_values = (None, None) if scales is None else scales
    store(keys, slots, _rotated(key, cos, sin).transpose(0, 1), of_keys)
    store(values, slots, value.transpose(0, 1), of_values)
    return _rotated(query, cos, sin)


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second: [tokens, 2 * width] -> [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


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
    """Attention of one token of each sequence to the keys and values in its pages.

    Args:
        query: [sequences, heads, head_dim].
        keys, values: a layer of the KV pool, [kv_heads, positions, head_dim].
        table: int32 [sequences, pages]: pages of the KV pool. Nothing reads entries behind a sequence's end.
        used: int32 [sequences], keys of each, its newest token's included; at least one.
        page_size: positions of a page.
        scaling: of the scores; None is the root of 1 / head_dim.
        window: keys that a sequence attends to, counted from its end; None is all.
        slopes: of ALiBi, float32 [heads]; None adds no bias.
        scales: as for `rotate_and_write`.

    Returns:
        [sequences, heads, head_dim].
    """
    sequences, heads, head_dim = query.shape
    kv_heads = len(keys)
    positions = torch.arange(table.shape[1] * page_size, device=query.device)
    distances = positions - (used[:, None].long() - 1)  # [sequences, positions]; below 0 behind the newest token
    hidden = distances > 0
    if window is not None:
        hidden |= distances <= -window
    slots = table[:, positions // page_size].long() * page_size + positions % page_size
    slots = slots.masked_fill(hidden, 0)
    wide = torch.promote_types(query.dtype, torch.float32)
    # Hidden ones may hold anything, NaN too.
    found_keys, found_values = (
        load(memory, slots, scale, wide).masked_fill(hidden[None, ..., None], 0)
        for memory, scale in zip((keys, values), (None, None) if scales is None else scales, strict=True)
    )
    grouped = query.to(wide).view(sequences, kv_heads, -1, head_dim)
    scores = torch.einsum("skgd,ksnd->skgn", grouped, found_keys)
    scores *= head_dim**-0.5 if scaling is None else scaling
    if slopes is not None:
        scores += slopes.to(wide).view(kv_heads, -1, 1) * distances[:, None, None]
    shares = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("skgn,ksnd->skgd", shares, found_values).reshape(sequences, heads, head_dim).to(query.dtype)


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
    """Attention of tokens of one sequence to its keys and values, of which theirs are the last.

    Args:
        query: [heads, tokens, head_dim].
        keys, values: [kv_heads, keys, head_dim].
        scaling, window, slopes, scales: as for `decode_attention`.
        causal: a token attends to no later key; else to all.

    Returns:
        [tokens, heads, head_dim].
    """
    heads, tokens, head_dim = query.shape
    kv_heads, count, _ = keys.shape
    positions = torch.arange(count, device=query.device)
    distances = positions - positions[-tokens:, None]  # [tokens, keys]; above 0 behind a token
    hidden = (distances > 0) & causal
    if window is not None:
        hidden |= distances <= -window
    wide = torch.promote_types(query.dtype, torch.float32)
    of_keys, of_values = (None, None) if scales is None else scales
    found_keys, found_values = (
        load(keys, positions, of_keys, query.dtype),
        load(values, positions, of_values, query.dtype),
    )
    grouped = query.to(wide).view(kv_heads, -1, tokens, head_dim)
    scores = torch.einsum("kgtd,knd->kgtn", grouped, found_keys.to(wide))
    scores *= head_dim**-0.5 if scaling is None else scaling
    if slopes is not None:
        scores += slopes.to(wide).view(kv_heads, -1, 1, 1) * distances
    shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = torch.einsum("kgtn,knd->tkgd", shares, found_values.to(wide))
    return out.reshape(tokens, heads, head_dim).to(query.dtype)


def sample_top_p(logits: torch.Tensor, top_p: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling among the fewest tokens that reach a share: of equally likely ones the first.

    Args:
        logits: float32 [sequences, vocabulary]; -inf is no token.
        top_p: float32 [sequences], above 0; 1 keeps all tokens.
        noise: float64 [sequences] in [0, 1).

    Returns:
        int64 [sequences].
    """
    shares, order = logits.softmax(-1, dtype=torch.float64).sort(dim=-1, descending=True, stable=True)
    limit = top_p.double()[:, None]
    dropped = (shares.cumsum(-1) - shares >= limit) & (limit < 1)
    mass = torch.zeros_like(shares).scatter_(-1, order, shares.masked_fill(dropped, 0)).cumsum(-1)
    tokens = torch.searchsorted(mass, noise.double()[:, None] * mass[:, -1:], right=True)[:, 0]
    return torch.minimum(tokens, (mass < mass[:, -1:]).sum(-1))
