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
    tokens, finite = _sample_each(_chosen(step.logits, single) if beams else step.logits, own, step.finite)
    for checked, is_finite in zip(step.checked, finite, strict=True):
        if is_finite:
            continue
        if isinstance(checked, str):
            failed_images.setdefault(checked, numerical_error(dtype))
        else:
            failed.setdefault(checked.request.request_id, numerical_error(dtype))
    for sequence, token in zip(own, tokens, strict=True):
        error = token if isinstance(token, Exception) else _advance(sequence, token)
        if error is not None:
            failed.setdefault(sequence.request.request_id, error)
        elif not isinstance(token, Exception):
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


def _advance(sequence: Sequence, token: RawLogprob) -> Exception | None:
    """Moves a sequence's matcher on. Once per sampled token: what preemption computes again is not sampled."""
    return None if sequence.matcher is None else attempt(partial(sequence.matcher.advance, token.token_id))


def _extend(search: BeamSearch, logits: torch.Tensor) -> list[Extension] | Hypothesis:
    return search.advance(best_candidates(logits, search))


def _sample_each(
    logits: torch.Tensor, sequences: list[Sequence], flags: torch.Tensor
) -> tuple[list[RawLogprob | Exception], list[bool]]:
    """As `sample`. If that fails, samples one by one: each sequence gets its token or its own exception."""
    batch = attempt(partial(sample, logits, sequences, flags))
    if not isinstance(batch, Exception):
        return [*batch[0]], batch[1]
    each: list[RawLogprob | Exception] = []
    for index, sequence in enumerate(sequences):
        single = attempt(partial(sample, logits[index : index + 1], [sequence], flags[:0]))
        each.append(single if isinstance(single, Exception) else single[0][0])
    if not any(isinstance(one, Exception) for one in each):
        _logger.error("The tokens of a step could not be sampled as a batch, but one by one.", exc_info=batch)
    return each, flags.cpu().tolist()
