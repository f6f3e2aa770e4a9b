"""How an answer is sampled, with the bounds that the arithmetic of sampling holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from numbers import Integral, Real
from typing import Any

from llava_serve.errors import RequestError, UnsupportedParameterError, shown
from llava_serve.structured_output import StructuredOutput

_GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy: vLLM's bound."""
_LENGTHS = "a whole number, 1 or more; 0 goes with prompt_logprobs"
RANGES: tuple[tuple[str, Any, float, float, str], ...] = (
    ("temperature", Real, 0, 100, "between 0 and 100"),
    ("top_p", Real, math.ulp(0), 1, "above 0 and at most 1"),
    ("top_k", Integral, 0, math.inf, "a whole number, 0 or more"),
    ("min_p", Real, 0, 1, "between 0 and 1"),
    ("max_new_tokens", Integral, 0, math.inf, _LENGTHS),
    ("min_tokens", Integral, 0, math.inf, "a whole number, 0 or more"),
    ("seed", Integral, -(2**63), 2**63 - 1, "a whole number of 64 bits"),
    ("n", Integral, 1, 128, "a whole number between 1 and 128"),
    ("num_beams", Integral, 1, 64, "a whole number between 1 and 64"),
    ("logprobs", Integral, 0, 20, "a whole number between 0 and 20"),
    ("prompt_logprobs", Integral, 0, 20, "a whole number between 0 and 20"),
    ("presence_penalty", Real, -2, 2, "between -2 and 2"),
    ("frequency_penalty", Real, -2, 2, "between -2 and 2"),
    ("repetition_penalty", Real, 0.01, 10, "between 0.01 and 10"),
)
"""Of the sampling fields: name, type, least and greatest value, and the same in words. NaN lies in no range."""

ORIGINAL_TEMPERATURE = 0.2
"""Of the original's command line, and of ours."""

_MOST_BIAS = 100
"""OpenAI's bound of `logit_bias`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is sampled. The defaults are written here and nowhere else.

    Attributes:
        temperature: 0 is greedy, and so is less than 1e-5.
        top_p: nucleus mass in (0, 1].
        top_k: sample from this many likeliest tokens; 0, or more than the vocabulary has, is all.
        min_p: sample from the tokens with at least this share of the likeliest one's probability; 0 is all.
        max_new_tokens: the longest answer, the end token included; the context's end cuts it, too. 0, which goes with
            `prompt_logprobs`, is no answer.
        min_tokens: tokens before which neither an end token nor a stop string ends the answer.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, beside the model's end tokens; their text is not part of it.
        include_stop_str_in_output: what ends the answer of `stop` and `stop_token_ids` is a part of it.
        logit_bias: added to the logits of tokens, by id; each in [-100, 100], as OpenAI's.
        seed: a signed number of 64 bits; makes sampling a function of (seed, choice, position).
        n: answers per prompt.
        num_beams: above 1 is beam search, whose answer is sent only at its end.
        logprobs: None, or how many alternatives to report beside each token (0 to 20).
        prompt_logprobs: None, or how many alternatives to report beside each text token of the prompt (0 to 20). Such a
            prompt is computed as a whole: the prefix cache is not read.
        presence_penalty: OpenAI's, in [-2, 2].
        frequency_penalty: OpenAI's, in [-2, 2].
        repetition_penalty: in [0.01, 10]; 1 is none.
        ignore_eos: go on to `max_new_tokens` even after an end token of the model or the template.
        structured: the form that the answer has. The answer ends where its form is complete.
        max_tokens: another name for `max_new_tokens`, as in OpenAI's API and vLLM.

    Raises:
        RequestError: a value is outside its range; `param` names it.
        UnsupportedParameterError: a field cannot be given with `structured`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    num_beams: int = 1
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    max_tokens: InitVar[int | None] = None
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    structured: StructuredOutput | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self, max_tokens: int | None) -> None:
        if max_tokens is not None:
            object.__setattr__(self, "max_new_tokens", max_tokens)

        def check(good: bool, name: str, rule: str) -> None:
            if not good:
                value = getattr(self, name)
                got = shown(repr(value) if isinstance(value, str) else value)
                raise RequestError(f"{name} must be {rule}; got {got}.", name)

        for name, kind, least, greatest, rule in RANGES:
            value = getattr(self, name)
            absent = value is None and name in ("seed", "logprobs", "prompt_logprobs")
            number = isinstance(value, kind) and not isinstance(value, bool)
            check(absent or (number and least <= value <= greatest), name, rule)
        check(self.max_new_tokens > 0 or self.prompt_logprobs is not None, "max_new_tokens", _LENGTHS)
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        check(texts, "stop", "a tuple of strings that are not empty")
        check(_are_ids(self.stop_token_ids), "stop_token_ids", "token ids, whole numbers from 0 on")
        bias = self.logit_bias or {}
        in_range = all(isinstance(value, int | float) and abs(value) <= _MOST_BIAS for value in bias.values())
        check(_are_ids(tuple(bias)) and in_range, "logit_bias", f"numbers within {_MOST_BIAS} by token id")
        check(not self.max_new_tokens < self.min_tokens, "min_tokens", "at most the longest answer")
        if self.num_beams > 1 and (not self.greedy or self.n > 1):
            raise RequestError("num_beams above 1 needs temperature 0 and n 1.", "num_beams")
        if self.structured is not None:
            check(isinstance(self.structured, StructuredOutput), "structured", "a StructuredOutput")
            beams = self.num_beams > 1  # they would need the grammar's state of every beam; the others move its end
            for given, name in ((beams, "num_beams"), (self.ignore_eos, "ignore_eos"), (self.min_tokens, "min_tokens")):
                if given:
                    raise UnsupportedParameterError(f"{name} cannot be given with structured output.", name)

    @property
    def greedy(self) -> bool:
        """The likeliest token is taken each time."""
        return self.temperature < _GREEDY_BELOW


def _are_ids(given: Any) -> bool:
    return isinstance(given, tuple) and all(isinstance(each, Integral) and int(each) >= 0 for each in given)


def with_original_temperature(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` with the command line's temperature where they have none: 0 for beam search."""
    return {"temperature": ORIGINAL_TEMPERATURE if values.get("num_beams", 1) == 1 else 0.0, **values}
