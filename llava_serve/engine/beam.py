"""Beam search over the rows of one group, as transformers does it with length penalty 1 and no early stopping."""

from __future__ import annotations

from dataclasses import dataclass

from llava_serve.engine.sequence import Group


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished answer. `score` is the sum of its log-probabilities over its length; `ended` by an end token."""

    score: float
    token_ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Extension:
    """Row `row` becomes what row `parent` was, continued by `token`."""

    row: int
    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """Row `parent` could go on with `token`; `total` is the sum of the log-probabilities then."""

    parent: int
    token: int
    total: float


class BeamSearch:
    """The search of one group: its open rows' sums, and the best hypotheses so far. No tensors.

    Attributes:
        group: whose search it is.
        totals: sums of the log-probabilities of the active rows.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._width = group.request.sampling.num_beams
        self.totals = [0.0]
        self._finished: list[Hypothesis] = []

    @property
    def num_candidates(self) -> int:
        """How many of the best continuations are wanted: enough that `num_beams` of them are no end tokens."""
        return max(2, 1 + len(self.group.request.stop_token_ids)) * self._width

    def advance(self, candidates: list[Candidate]) -> list[Extension] | Hypothesis:
        """One step of the search.

        Args:
            candidates: the best continuations of all active rows, best first.

        Returns:
            What the `num_beams` rows become, or the best hypothesis where the search has ended.
        """
        request = self.group.request
        length = self.group.rows[0].num_output + 1
        open_: list[Candidate] = []
        for rank, candidate in enumerate(candidates):
            if candidate.token not in request.stop_token_ids:
                open_.append(candidate)
            elif rank < self._width:
                self._finish(candidate, length, ended=True)
            if len(open_) == self._width:
                break
        if length >= request.max_new_tokens:
            for candidate in open_:
                self._finish(candidate, length, ended=False)
            return self._finished[0]
        if len(self._finished) == self._width and self._finished[-1].score >= candidates[0].total / length:
            return self._finished[0]  # transformers' rule: no row that is still open can be expected to win
        return self._place(open_)

    def _place(self, candidates: list[Candidate]) -> list[Extension]:
        """Chooses which row holds which candidate, so that as few as possible are copied."""
        parents = {candidate.parent for candidate in candidates}
        spare = [row for row in range(self._width) if row not in parents]
        extensions: list[Extension] = []
        totals = [0.0] * self._width
        for candidate in candidates:
            row = candidate.parent if candidate.parent in parents else spare.pop()
            parents.discard(row)
            totals[row] = candidate.total
            extensions.append(Extension(row, candidate.parent, candidate.token))
        self.totals = totals
        return extensions

    def _finish(self, candidate: Candidate, length: int, *, ended: bool) -> None:
        """Enters a hypothesis, if it is among the `num_beams` best."""
        row = self.group.rows[candidate.parent]
        answer = (*row.token_ids[row.num_prompt :], candidate.token)
        self._finished.append(Hypothesis(candidate.total / length, answer, ended))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._width :]
