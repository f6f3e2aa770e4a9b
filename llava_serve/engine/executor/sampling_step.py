"""Samples the next tokens of a step. A failure in one sequence fails its request only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from llava_serve.engine.beam import BeamSearch, Extension, Hypothesis
from llava_serve.engine.executor.attempt import attempt
from llava_serve.engine.executor.model_runner import StepResult
from llava_serve.engine.executor.sampler import best_candidates, sample
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


def sample_step(
    step: StepResult, sequences: list[Sequence], searches: Mapping[str, BeamSearch], dtype: torch.dtype
) -> SampledStep:
    """Samples the next token of each sequence. The beams of a search are extended together.

    Args:
        sequences: those of the step's logits, in their order.
        searches: by request id.
        dtype: of the model.
    """
    beams: dict[str, list[int]] = {}
    single: list[int] = []
    for index, sequence in enumerate(sequences):
        if sequence.request.request_id in searches:
            beams.setdefault(sequence.request.request_id, []).append(index)
        else:
            single.append(index)
    failed = dict(step.failures.requests)
    failed_images = dict(step.failures.images)
    sampled = SampledStep([], [], StepFailures(failed, failed_images))
    own = [sequences[index] for index in single]
    logits = _chosen(step.logits, single) if beams else step.logits
    tokens, finite = _sample_each(logits, own, step.finite)
    for checked, is_finite in zip(step.checked, finite, strict=True):
        if is_finite:
            continue
        if isinstance(checked, str):
            failed_images.setdefault(checked, numerical_error(dtype))
        else:
            failed.setdefault(checked.request.request_id, numerical_error(dtype))
    tokens = [failed.get(sequence.request.request_id, token) for sequence, token in zip(own, tokens, strict=True)]
    for sequence, token in zip(own, _follow(logits, own, tokens), strict=True):
        if isinstance(token, Exception):
            failed.setdefault(sequence.request.request_id, token)
        else:
            sampled.tokens.append((sequence, token))
    for name, indices in beams.items():
        if name in failed:
            continue
        extended = attempt(partial(_extend, searches[name], _chosen(step.logits, indices)))
        if isinstance(extended, Exception):
            failed[name] = extended
        else:
            sampled.beams.append((searches[name], extended))
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
        again, _ = _sample_each(_chosen(logits, refused), own, no_flags, again=True)
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


def _sample_each(
    logits: torch.Tensor, sequences: list[Sequence], flags: torch.Tensor, *, again: bool = False
) -> tuple[list[RawLogprob | Exception], list[bool]]:
    """As `sample`. If that fails, samples one by one: each sequence gets its token or its own exception."""
    batch = attempt(partial(sample, logits, sequences, flags, again=again))
    if not isinstance(batch, Exception):
        return [*batch[0]], batch[1]
    each: list[RawLogprob | Exception] = []
    for index, sequence in enumerate(sequences):
        own = logits[index : index + 1]
        single = attempt(partial(sample, own, [sequence], flags[:0], again=again))
        each.append(single if isinstance(single, Exception) else single[0][0])
    if not any(isinstance(one, Exception) for one in each):
        _logger.error("The tokens of a step could not be sampled as a batch, but one by one.", exc_info=batch)
    return each, flags.cpu().tolist()
