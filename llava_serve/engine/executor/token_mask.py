"""Keeps sequences to their grammars: masks the logits of tokens that may not come next."""

from __future__ import annotations

import numpy as np
import torch

from llava_serve.engine.sequence import Sequence


def mask_tokens(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Makes the logits of tokens that a sequence's grammar does not allow -inf, in place.

    Sequences without a grammar are left as they are.

    Args:
        logits: [sequences, vocabulary].

    Raises:
        RequestError: a sequence cannot go on within its grammar.
    """
    matchers = {at: one.matcher for at, one in enumerate(sequences) if one.matcher is not None}
    if not matchers:
        return
    packed = torch.from_numpy(np.stack([matcher.allowed() for matcher in matchers.values()])).to(logits.device)
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=logits.device)
    vocabulary = logits.shape[1]
    forbidden = ((packed[:, :, None] & bits) == 0).flatten(1)[:, :vocabulary]
    masked = torch.tensor(list(matchers), device=logits.device)
    logits[masked] = logits[masked].masked_fill(forbidden, float("-inf"))
