"""Samples the next tokens of a step. A failure in one sequence fails its request only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from llava_serve.engine.beam import BeamSearch, Extension, Hypothesis
from llava_serve.engine.executor.attempt import attempt
from llava_serve.engine.executor.pending_tokens import PendingTokens
from llava_serve.engine.executor.sampler import best_candidates, sample
from llava_serve.engine.executor.step_result import StepResult
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.failures import StepFailures
from llava_serve.engine.grammar import too_complex
from llava_serve.engine.sequence import RawLogprob, Sequence
from llava_serve.model.numerics import numerical_error

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampledStep:
    """The next tokens of a step's sequences.

    Attributes:
        tokens: of each sequence outside a beam search.
        beams: of each search, what its beams become.
        failures: those of the step, and of this part of it. Tokens of such a request are not to be used.
    """

    tokens: list[tuple[Sequence, RawLogprob]]
    beams: list[tuple[BeamSearch, list[Extension] | Hypothesis]]
    failures: StepFailures


class PendingStep:
    """The next tokens of a step's sequences, sampled and not yet read. The beams of a search are extended together.

    Args:
        sequences: those of the step's logits, in their order.
        searches: by request id.
        dtype: of the model.
        float8: keys and values are stored as 8-bit floats.
    """

    def __init__(
        self,
        step: StepResult,
        sequences: list[Sequence],
        searches: Mapping[str, BeamSearch],
        dtype: torch.dtype,
        *,
        float8: bool = False,
    ) -> None:
        self._step, self._dtype, self._float8 = step, dtype, float8
        self._searches = searches
        self._beams: dict[str, list[int]] = {}
        single: list[int] = []
        for index, sequence in enumerate(sequences):
            if sequence.request.request_id in searches:
                self._beams.setdefault(sequence.request.request_id, []).append(index)
            else:
                single.append(index)
        self._sequences = [sequences[index] for index in single]
        self._logits = _chosen(step.logits, single) if self._beams else step.logits
        self._tokens: PendingTokens | Exception
        if step.ids is not None:
            self._tokens = PendingTokens.sampled(step.ids, step.finite)
        else:
            self._tokens = attempt(partial(sample, self._logits, self._sequences, step.finite))

    @property
    def ids(self) -> torch.Tensor | None:
        """int64 [sequences] on the device, for a step that is launched before this one is read; None where that cannot
        be, since `read` needs the logits."""
        return None if self._beams or isinstance(self._tokens, Exception) else self._tokens.ids

    def read(self) -> SampledStep:
        """Waits for the tokens. Those of sequences that have ended meanwhile are dropped, and their failures."""
        failed = dict(self._step.failures.requests)
        failed_images = dict(self._step.failures.images)
        sampled = SampledStep([], [], StepFailures(failed, failed_images))
        tokens, finite = _read_each(self._tokens, self._logits, self._sequences, self._step.finite)
        for checked, is_finite in zip(self._step.checked, finite, strict=True):
            if is_finite:
                continue
            if isinstance(checked, str):
                failed_images.setdefault(checked, numerical_error(self._dtype))
            elif checked.is_running:
                failed.setdefault(checked.request.request_id, numerical_error(self._dtype, float8=self._float8))
        tokens = [
            failed.get(sequence.request.request_id, token)
            for sequence, token in zip(self._sequences, tokens, strict=True)
        ]
        for sequence, token in zip(self._sequences, _follow(self._logits, self._sequences, tokens), strict=True):
            if not sequence.is_running:
                continue
            if isinstance(token, Exception):
                failed.setdefault(sequence.request.request_id, token)
            else:
                sampled.tokens.append((sequence, token))
        for name, indices in self._beams.items():
            if name in failed:
                continue
            extended = attempt(partial(_extend, self._searches[name], _chosen(self._step.logits, indices)))
            if isinstance(extended, Exception):
                failed[name] = extended
            else:
                sampled.beams.append((self._searches[name], extended))
        return sampled


def _chosen(logits: torch.Tensor, indices: list[int]) -> torch.Tensor:
    return logits.index_select(0, to_device(torch.tensor(indices, dtype=torch.long), logits.device))


def _follow(
    logits: torch.Tensor, sequences: list[Sequence], tokens: list[RawLogprob | Exception]
) -> list[RawLogprob | Exception]:
    """Moves the matchers on, once per sampled token: what preemption computes again is not sampled. For a token that
    is not allowed another one is sampled."""
    followed = [*map(_advance, sequences, tokens)]
    if refused := [index for index, token in enumerate(followed) if token is None]:
        own = [sequences[index] for index in refused]
        no_flags = torch.ones(0, dtype=torch.bool, device=logits.device)
        chosen = _chosen(logits, refused)
        batch = attempt(partial(sample, chosen, own, no_flags, again=True))
        again, _ = _read_each(batch, chosen, own, no_flags, again=True)
        for index, sequence, token in zip(refused, own, again, strict=True):
            followed[index] = _advance(sequence, token)
    return [token or too_complex() for token in followed]


def _advance(sequence: Sequence, token: RawLogprob | Exception) -> RawLogprob | Exception | None:
    """The token, or why the sequence has none; None where its grammar does not allow it."""
    if sequence.matcher is None or isinstance(token, Exception):
        return token
    allowed = attempt(partial(sequence.matcher.advance, token.token_id))
    if isinstance(allowed, Exception):
        return allowed
    return token if allowed else None


def _extend(search: BeamSearch, logits: torch.Tensor) -> list[Extension] | Hypothesis:
    return search.advance(best_candidates(logits, search))


def _read_each(
    batch: PendingTokens | Exception,
    logits: torch.Tensor,
    sequences: list[Sequence],
    flags: torch.Tensor,
    *,
    again: bool = False,
) -> tuple[list[RawLogprob | Exception], list[bool]]:
    """The tokens and flags of `sample`. If that fails, samples one by one: each sequence gets its token or its own
    exception."""
    read = batch if isinstance(batch, Exception) else attempt(batch.read)
    if not isinstance(read, Exception):
        return [*read[0]], read[1]
    each: list[RawLogprob | Exception] = []
    for index, sequence in enumerate(sequences):
        own = logits[index : index + 1]
        each.append(attempt(partial(_sample_one, own, sequence, flags[:0], again=again)))
    if not any(isinstance(one, Exception) for one in each):
        _logger.error("The tokens of a step could not be sampled as a batch, but one by one.", exc_info=read)
    return each, flags.cpu().tolist()


def _sample_one(logits: torch.Tensor, sequence: Sequence, no_flags: torch.Tensor, *, again: bool) -> RawLogprob:
    tokens, _ = sample(logits, [sequence], no_flags, again=again).read()
    return tokens[0]
