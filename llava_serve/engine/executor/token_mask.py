"""Keeps sequences to their grammars: masks the logits of tokens that may not come next."""

from __future__ import annotations

import numpy as np
import torch

from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.sequence import Sequence


def mask_tokens(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Makes the logits of tokens that a sequence's grammar does not allow -inf, in place.

    Sequences without a grammar are left as they are.

    Args:
        logits: [sequences, vocabulary].

    Raises:
        RequestError: a sequence cannot go on within its grammar.
    """
    allowed = {at: one.matcher.allowed() for at, one in enumerate(sequences) if one.matcher is not None}
    if not allowed:
        return
    packed = np.full((len(sequences), len(next(iter(allowed.values())))), 0xFF, np.uint8)  # the others: all tokens
    for at, bits in allowed.items():
        packed[at] = bits
    forbidden = np.unpackbits(~packed, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    logits.masked_fill_(to_device(torch.from_numpy(forbidden), logits.device), float("-inf"))
