"""Sampled tokens on their way from the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from llava_serve.engine.executor.transfer import HostCopy
from llava_serve.engine.sequence import RawLogprob

Queue = Callable[[bool], tuple[torch.Tensor | None, HostCopy]]
"""Samples, and truncates by a sort of all tokens, or of the best few. Returns the ids [sequences] on the device, None
where too few may be sorted; and a copy of: ids, whether enough were sorted, flags, and a table of log-probabilities for
each number of alternatives."""


class PendingTokens:
    """The next tokens of a batch, which a GPU may still have to compute.

    Args:
        asked: indices of the sequences by the number of alternatives that they ask for.

    Attributes:
        ids: int64 [sequences] on the device, for a step that is launched before they are read. None where that cannot
            be: they may be sampled again.
    """

    @classmethod
    def sampled(cls, ids: torch.Tensor, flags: torch.Tensor) -> PendingTokens:
        """Tokens that the step itself has sampled, without log-probabilities."""
        return cls(lambda _: (ids, HostCopy([ids, flags[:0], flags])), {})

    def __init__(self, queue: Queue, asked: Mapping[int, list[int]]) -> None:
        self.ids, self._copy = queue(False)
        self._queue = queue if self.ids is None else None  # it holds the logits
        self._asked = asked

    def read(self) -> tuple[list[RawLogprob], list[bool]]:
        """The tokens, and the flags. A GPU is waited for once, and once more where too few were sorted.

        Log-probabilities are the model's own, before temperature, penalties and grammars; they are computed, with the
        alternatives, only for requests that ask, and are 0 elsewhere.
        """
        ids, sufficient, checked, *columns = self._copy.values()
        if self._queue is not None and not all(sufficient):
            ids, _, checked, *columns = self._queue(True)[1].values()
        entries = [RawLogprob(int(token), 0.0) for token in ids]
        for indices, values in zip(self._asked.values(), columns, strict=True):
            width = len(values) // len(indices)
            for at, index in enumerate(indices):
                own, *best = values[at * width : (at + 1) * width]
                top = zip(map(int, best[: width // 2]), best[width // 2 :], strict=True)
                entries[index] = RawLogprob(entries[index].token_id, own, tuple(top))
        return entries, [bool(flag) for flag in checked]
