"""Draws the tokens of a step. What fails for one sequence is the failure of its request alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from llava_serve.engine.beam import BeamSearch, Extension, Hypothesis
from llava_serve.engine.executor.attempt import attempt
from llava_serve.engine.executor.model_runner import StepResult
from llava_serve.engine.executor.sampler import best_continuations, sample
from llava_serve.engine.sequence import RawLogprob, Sequence
from llava_serve.model.numerics import numerical_error

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step's sequences drew.

    Attributes:
        tokens: of each that draws for itself.
        beams: of each search, what its rows become.
        failures: by request id. What else there is of such a request does not count.
    """

    tokens: list[tuple[Sequence, RawLogprob]]
    beams: list[tuple[BeamSearch, list[Extension] | Hypothesis]]
    failures: dict[str, Exception]


def draw(step: StepResult, sequences: list[Sequence], searches: Mapping[str, BeamSearch], dtype: torch.dtype) -> Drawn:
    """Draws the next token of each sequence; those of a beam search move as one.

    Args:
        sequences: whose logits the step has, in their order.
        searches: by request id.
        dtype: of the model.
    """
    beams: dict[str, list[int]] = {}
    single: list[int] = []
    for row, sequence in enumerate(sequences):
        if sequence.request.request_id in searches:
            beams.setdefault(sequence.request.request_id, []).append(row)
        else:
            single.append(row)
    drawn = Drawn([], [], dict(step.failures))
    own = [sequences[row] for row in single]
    tokens, finite = _sample_each(step.logits[single] if beams else step.logits, own, step.finite)
    for sequence, good in zip(step.judged, finite, strict=True):
        if not good:
            drawn.failures.setdefault(sequence.request.request_id, numerical_error(dtype))
    for sequence, token in zip(own, tokens, strict=True):
        if isinstance(token, Exception):
            drawn.failures.setdefault(sequence.request.request_id, token)
        else:
            drawn.tokens.append((sequence, token))
    for name, rows in beams.items():
        if name in drawn.failures:
            continue
        extended = attempt(partial(_extend, searches[name], step.logits[rows]))
        if isinstance(extended, Exception):
            drawn.failures[name] = extended
        else:
            drawn.beams.append((searches[name], extended))
    return drawn


def _extend(search: BeamSearch, logits: torch.Tensor) -> list[Extension] | Hypothesis:
    return search.advance(best_continuations(logits, search))


def _sample_each(
    logits: torch.Tensor, sequences: list[Sequence], flags: torch.Tensor
) -> tuple[list[RawLogprob | Exception], list[bool]]:
    """As `sample`. Where that fails, row by row: those at fault get their exceptions, and the others their tokens."""
    together = attempt(partial(sample, logits, sequences, flags))
    if not isinstance(together, Exception):
        return [*together[0]], together[1]
    each: list[RawLogprob | Exception] = []
    for row, sequence in enumerate(sequences):
        alone = attempt(partial(sample, logits[row : row + 1], [sequence], flags[:0]))
        each.append(alone if isinstance(alone, Exception) else alone[0][0])
    if not any(isinstance(one, Exception) for one in each):
        _logger.error("The tokens of a step could not be drawn together, but one by one.", exc_info=together)
    return each, flags.tolist()
