"""Top-p sampling in Triton without a sort: bisection of the share below which a token is dropped."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_WAYS, _PASSES = 8, 14
"""A pass over the vocabulary tries 8 thresholds, so 14 passes find one to 2**-42 of the likeliest token's share."""


@triton.jit
def sample_top_p_kernel(
    logits, top_p, noise, out, stride, vocabulary, block: tl.constexpr, ways: tl.constexpr, passes: tl.constexpr
):
    """A program per sequence. Masses are relative to that of the likeliest token; sums over blocks are in float64."""
    sequence = tl.program_id(0)
    source = logits + sequence.to(tl.int64) * stride
    column = tl.arange(0, block)
    highest = tl.full([block], float("-inf"), tl.float32)
    for at in range(0, vocabulary, block):
        inside = at + column < vocabulary
        highest = tl.maximum(highest, tl.load(source + at + column, mask=inside, other=float("-inf")))
    top = tl.max(highest, 0)
    share = tl.load(top_p + sequence)

    limit = tl.full([1], 0.0, tl.float64)
    least = tl.full([1], 0.0, tl.float32)  # the smallest mass of a token that is kept
    if share < 1:
        for at in range(0, vocabulary, block):
            inside = at + column < vocabulary
            mass = tl.exp(tl.load(source + at + column, mask=inside, other=float("-inf")) - top)
            limit += tl.sum(mass, 0).to(tl.float64)
        limit *= share.to(tl.float64)
        low = tl.full([1], 0.0, tl.float32)
        width = tl.full([1], 1.0, tl.float32)
        for _ in range(passes):
            width /= ways
            threshold = low + width * (1 + tl.arange(0, ways)).to(tl.float32)
            kept = tl.zeros([ways], tl.float64)
            for at in range(0, vocabulary, block):
                inside = at + column < vocabulary
                mass = tl.exp(tl.load(source + at + column, mask=inside, other=float("-inf")) - top)
                kept += tl.sum(tl.where(mass[None, :] >= threshold[:, None], mass[None, :], 0.0), 1).to(tl.float64)
            low += width * tl.sum((kept >= limit).to(tl.int32), 0).to(tl.float32)
        low = tl.minimum(low, 1.0)  # a limit that rounds to 0 keeps the likeliest token all the same
        least += 1.0
        for at in range(0, vocabulary, block):
            inside = at + column < vocabulary
            mass = tl.exp(tl.load(source + at + column, mask=inside, other=float("-inf")) - top)
            least = tl.minimum(least, tl.min(tl.where((mass >= low) & (mass > 0), mass, 1.0), 0))

    above = tl.full([1], 0.0, tl.float64)
    for at in range(0, vocabulary, block):
        inside = at + column < vocabulary
        mass = tl.exp(tl.load(source + at + column, mask=inside, other=float("-inf")) - top)
        above += tl.sum(tl.where(mass > least, mass, 0.0), 0).to(tl.float64)
    ties = tl.full([1], 0.0, tl.float64)  # how many tokens of the smallest mass are kept, the first ones
    if share < 1:
        ties = tl.maximum(tl.ceil((limit - above) / least.to(tl.float64)), 1.0)

    target = tl.load(noise + sequence) * (above + ties * least.to(tl.float64))
    passed = tl.full([1], 0.0, tl.float64)
    met = tl.full([1], 0, tl.int32)
    sampled = tl.full([1], 0, tl.int32) + vocabulary
    last = tl.full([1], 0, tl.int32)
    for at in range(0, vocabulary, block):
        inside = at + column < vocabulary
        mass = tl.exp(tl.load(source + at + column, mask=inside, other=float("-inf")) - top)
        equal = (mass == least).to(tl.int32)
        within = (met + tl.cumsum(equal, 0)).to(tl.float64) <= ties
        mass = tl.where((mass > least) | ((equal > 0) & within), mass, 0.0)
        reached = (mass > 0) & (passed + tl.cumsum(mass, 0).to(tl.float64) > target)
        sampled = tl.minimum(sampled, tl.min(tl.where(reached, at + column, vocabulary), 0))
        last = tl.maximum(last, tl.max(tl.where(mass > 0, at + column, 0), 0))
        passed += tl.sum(mass, 0).to(tl.float64)
        met += tl.sum(equal, 0)
    # Rounding may put the target at the very end: then the last token with any mass is taken.
    tl.store(out + sequence + tl.arange(0, 1), tl.minimum(sampled, last).to(tl.int64))


def sample_top_p(logits: torch.Tensor, top_p: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """See `twins.sample_top_p`."""
    assert logits.stride(1) == 1, "a sequence's logits are neighbours"
    sequences, vocabulary = logits.shape
    out = torch.empty(sequences, dtype=torch.int64, device=logits.device)
    sample_top_p_kernel[(sequences,)](
        logits, top_p, noise, out, logits.stride(0), vocabulary,
        block=_BLOCK, ways=_WAYS, passes=_PASSES, num_warps=16,
    )  # fmt: skip
    return out
