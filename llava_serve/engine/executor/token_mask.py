"""Keeps sequences to their grammars: masks the logits of tokens that may not come next."""

from __future__ import annotations

import numpy as np
import torch

from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.sequence import Sequence


def mask_tokens(logits: torch.Tensor, sequences: list[Sequence], masked: list[int]) -> None:
    """Makes the logits of tokens that the grammars of some sequences do not allow -inf, in place.

    Args:
        logits: [sequences, vocabulary].
        masked: indices of the sequences whose grammars are applied.

    Raises:
        RequestError: a sequence cannot go on within its grammar.
    """
    allowed = {at: matcher.allowed() for at in masked if (matcher := sequences[at].matcher) is not None}
    if not allowed:
        return
    packed = np.full((len(sequences), len(next(iter(allowed.values())))), 0xFF, np.uint8)  # the others: all tokens
    for at, bits in allowed.items():
        packed[at] = bits
    forbidden = np.unpackbits(~packed, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    logits.masked_fill_(to_device(torch.from_numpy(forbidden), logits.device), float("-inf"))
