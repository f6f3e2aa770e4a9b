"""Sampling inside the graph of a decode step: all that it needs of the requests is a table of numbers.

That is so for greedy sequences, and for sampled ones whose next token depends on nothing but the logits, numbers of the
request, and the sequence's noise. Others (penalties, biases, forms, log-probabilities, beams) are sampled behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from enum import IntEnum

import torch

from llava_serve.engine.executor.sampler import MAX_PARTIAL_SORT, adjusts, keep_best, noise, scaled_logits
from llava_serve.engine.sequence import Sequence

SampleKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Top-p sampling: see `twins.sample_top_p`."""


_ZEROS = (0.0,) * 5


class SamplingKind(IntEnum):
    """How a batch is sampled; each does what those before it do, too."""

    GREEDY = 0
    SAMPLED = 1
    TOP_K = 2


def sampling_kind(sequences: SequenceOf[Sequence]) -> SamplingKind | None:
    """How a graph can sample a batch; None where it cannot."""
    kinds = [_kind(sequence) for sequence in sequences]
    return None if None in kinds else max(kind for kind in kinds if kind is not None)


def _kind(sequence: Sequence) -> SamplingKind | None:
    sampling = sequence.request.sampling
    plain = sampling.logprobs is None and sampling.num_beams == 1 and sequence.matcher is None
    if not plain or adjusts(sequence) or sampling.top_k > MAX_PARTIAL_SORT:
        return None
    if sampling.greedy:
        return SamplingKind.GREEDY
    return SamplingKind.TOP_K if sampling.top_k else SamplingKind.SAMPLED


def sampling_numbers(sequences: SequenceOf[Sequence], batch_size: int) -> torch.Tensor:
    """float64 [5, batch_size]: temperature, top_p, top_k, min_p and noise; of greedy sequences and padding zeros."""
    table = [_numbers(sequence) for sequence in sequences] + [_ZEROS] * (batch_size - len(sequences))
    return torch.tensor(table, dtype=torch.float64).T.contiguous()


def _numbers(sequence: Sequence) -> tuple[float, ...]:
    sampling = sequence.request.sampling
    if sampling.greedy:
        return _ZEROS
    return sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, noise(sequence)


def next_tokens(
    logits: torch.Tensor, numbers: torch.Tensor, kind: SamplingKind, kernel: SampleKernel | None
) -> torch.Tensor:
    """The next token of each sequence, int64 [sequences]. Nothing here waits for the device.

    Args:
        logits: [sequences, vocabulary]; not changed.
        numbers: see `sampling_numbers`. Greedy sequences do not need them.
        kernel: for what is not greedy.
    """
    best = logits.max(dim=-1).indices
    if kind == SamplingKind.GREEDY:
        return best
    assert kernel is not None, "graphs of other kinds are made with it"
    greedy = numbers[0] == 0
    temperature, top_p, _, min_p = numbers[:4].to(logits.dtype)[..., None]
    scaled = scaled_logits(logits, temperature.masked_fill(greedy[:, None], 1), min_p)
    share = torch.where(greedy, 1, numbers[1])
    if kind == SamplingKind.TOP_K:
        vocabulary = logits.shape[-1]
        top_k = numbers[2].long()[:, None].clamp(max=vocabulary)
        kept, _ = keep_best(scaled, top_k, top_p, min(MAX_PARTIAL_SORT, vocabulary))
        limited = top_k > 0
        scaled = torch.where(limited, kept, scaled)
        share = share.masked_fill(limited[:, 0], 1)
    return torch.where(greedy, best, kernel(scaled, share.float(), numbers[4]))
