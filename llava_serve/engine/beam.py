"""Beam search over the sequences of one group, as transformers does it with length penalty 1 and no early stopping."""

from __future__ import annotations

from dataclasses import dataclass

from llava_serve.engine.sequence import SequenceGroup


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam. `score` is the sum of its log-probabilities over its length; `ended`: by an end token."""

    score: float
    token_ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Extension:
    """Beam `beam` becomes what beam `parent` was, extended by `token`."""

    beam: int
    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """Beam `parent` extended by `token`; `total` is the sum of its log-probabilities then."""

    parent: int
    token: int
    total: float


class BeamSearch:
    """The search of one group: the scores of its open beams, and the best hypotheses so far. No tensors.

    Attributes:
        group: its sequences are the beams.
        totals: sums of the log-probabilities of the active beams.
    """

    def __init__(self, group: SequenceGroup) -> None:
        self.group = group
        self._width = group.request.sampling.num_beams
        self.totals = [0.0]
        self._finished: list[Hypothesis] = []

    @property
    def num_candidates(self) -> int:
        """How many of the best candidates a step needs: enough that `num_beams` of them are no end tokens."""
        return max(2, 1 + len(self.group.request.stop_token_ids)) * self._width

    def advance(self, candidates: list[Candidate]) -> list[Extension] | Hypothesis:
        """One step of the search.

        Args:
            candidates: the best extensions of all active beams, best first.

        Returns:
            What the `num_beams` beams become, or the best hypothesis where the search has ended.
        """
        request = self.group.request
        length = self.group.sequences[0].num_output + 1
        open_: list[Candidate] = []
        for place, candidate in enumerate(candidates):
            if candidate.token not in request.stop_token_ids:
                open_.append(candidate)
            elif place < self._width:
                self._finish(candidate, length, ended=True)
            if len(open_) == self._width:
                break
        if length >= request.max_new_tokens:
            for candidate in open_:
                self._finish(candidate, length, ended=False)
            return self._finished[0]
        if len(self._finished) == self._width and self._finished[-1].score >= candidates[0].total / length:
            return self._finished[0]  # transformers' rule: no open beam is expected to score higher
        return self._assign(open_)

    def _assign(self, candidates: list[Candidate]) -> list[Extension]:
        """Assigns the candidates to beams, so that as few as possible are copied."""
        parents = {candidate.parent for candidate in candidates}
        unused = [beam for beam in range(self._width) if beam not in parents]
        extensions: list[Extension] = []
        totals = [0.0] * self._width
        for candidate in candidates:
            beam = candidate.parent if candidate.parent in parents else unused.pop()
            parents.discard(beam)
            totals[beam] = candidate.total
            extensions.append(Extension(beam, candidate.parent, candidate.token))
        self.totals = totals
        return extensions

    def _finish(self, candidate: Candidate, length: int, *, ended: bool) -> None:
        """Keeps a hypothesis, if it is among the `num_beams` best."""
        parent = self.group.sequences[candidate.parent]
        token_ids = (*parent.token_ids[parent.num_prompt :], candidate.token)
        self._finished.append(Hypothesis(candidate.total / length, token_ids, ended))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._width :]
