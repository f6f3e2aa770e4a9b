"""Log-probabilities of a prompt's own tokens, from the hidden states of its prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llava_serve.engine.executor.transfer import to_device, to_host
from llava_serve.engine.scheduler import Segment
from llava_serve.engine.sequence import PromptLogprobs, RawLogprob, Sequence
from llava_serve.model.numerics import are_finite
from llava_serve.types import IMAGE_TOKEN_ID

PIECE = 64
"""Positions whose logits are in memory at once."""

LogitsOf = Callable[[list[int]], torch.Tensor]
"""Logits [positions, vocabulary] of some positions of a segment, counted from its start."""


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """What a segment tells of its sequence's prompt.

    Attributes:
        logprobs: of the positions `scored_positions`.
        finite: of each piece bool [1], on the device: its logits had no NaN and no infinity.
    """

    sequence: Sequence
    logprobs: PromptLogprobs
    finite: list[torch.Tensor]


def scored_positions(segment: Segment) -> range:
    """Positions of the prompt whose log-probabilities the segment gives: each by the logits of the one before."""
    known = segment.sequence.prompt_logprobs
    if known is None:
        return range(0)
    return range(max(len(known), segment.start + 1), min(segment.end + 1, segment.sequence.num_prompt))


def score_prompt(segment: Segment, logits_of: LogitsOf) -> ScoredPrompt:
    """Computes the log-probabilities of a segment's part of the prompt, the model's own, in pieces of `PIECE`."""
    sequence, scored = segment.sequence, scored_positions(segment)
    asked = sequence.request.sampling.prompt_logprobs or 0
    texts = [at for at in scored if sequence.token_ids[at] != IMAGE_TOKEN_ID]
    logprobs: PromptLogprobs = [None] * len(scored)
    finite = []
    for first in range(0, len(texts), PIECE):
        piece = texts[first : first + PIECE]
        table = logits_of([at - 1 - segment.start for at in piece])
        finite.append(are_finite(table)[None])
        for at, entry in zip(piece, _entries(table, [sequence.token_ids[at] for at in piece], asked), strict=True):
            logprobs[at - scored.start] = entry
    return ScoredPrompt(sequence, logprobs, finite)


def _entries(logits: torch.Tensor, tokens: list[int], asked: int) -> list[RawLogprob]:
    """Of each token by its logits, of [tokens, vocabulary], with so many alternatives."""
    table = logits.log_softmax(dim=-1)
    own = table.gather(1, to_device(torch.tensor(tokens), table.device)[:, None])
    ranks = (table >= own).sum(dim=-1)
    count = min(asked, table.shape[-1])
    best = table.topk(count, dim=-1)
    logprobs, places, ids, values = to_host([own, ranks, best.indices, best.values])
    alternatives = [*zip(map(int, ids), values, strict=True)]
    return [
        RawLogprob(token, logprob, tuple(alternatives[at * count : (at + 1) * count]), int(rank))
        for at, (token, logprob, rank) in enumerate(zip(tokens, logprobs, places, strict=True))
    ]
