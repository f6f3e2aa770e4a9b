"""Requests, sequences and sequence groups of the engine, and its outputs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from llava_serve.config import is_batch
from llava_serve.engine.grammar import Grammar, Matcher
from llava_serve.engine.timeline import Timeline
from llava_serve.errors import LlavaServeError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import IMAGE_TOKEN_ID, FinishReason, PreparedPrompt, StageTimes

_EXPECTED_OUTPUT = 512
"""Tokens of an answer that may go on to the end of the context."""


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """A validated request, for `Engine.add`.

    Attributes:
        request_id: unique among the requests in the engine.
        deadline: seconds since the epoch; None waits for ever.
        priority: a smaller number is served earlier; equals go in order of arrival.
        seed: of the sampling noise; the caller's, or a random one.
        max_new_tokens: the caller's, clamped to what the context holds.
        stop_token_ids: ids that end the answer.
        end_tokens: those of them that are the model's and the template's.
        grammar: that the answer keeps to.
        arrived: seconds of `time.perf_counter()`.
    """

    request_id: str
    prompt: PreparedPrompt
    sampling: SamplingParams
    deadline: float | None
    priority: int
    seed: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    end_tokens: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def num_sequences(self) -> int:
        """Sequences that it takes."""
        return self.sampling.n * self.sampling.num_beams


@dataclass(frozen=True, slots=True)
class RawLogprob:
    """A token's log-probability, and the best alternatives as (id, logprob), best first. A prompt's has a rank."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


PromptLogprobs = list[RawLogprob | None]
"""Of a prompt's positions from the first on. None for an image's; the first token has NaN: nothing comes before it."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a step generated for one choice of a request.

    Attributes:
        index: of the choice.
        finish_reason: set on the choice's last output, and only there.
        prompt_logprobs: on the first output of choice 0, where the request asks for them.
        error: the request has failed; no output of any of its choices follows.
        stages: on a choice's first output: how long the request took to it; see `Timeline`.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[RawLogprob, ...] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    error: LlavaServeError | None = None
    stages: StageTimes = ()


@dataclass(slots=True, eq=False)
class Extent:
    """Blocks [start, start + size) of the cache, held by one sequence."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Positions [source, source + length) of the memory go to [target, target + length), in the order given."""

    source: int
    target: int
    length: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence of tokens: a choice or a beam of a request.

    Attributes:
        index: of the choice.
        token_ids: prompt and answer so far; an image's positions hold `IMAGE_TOKEN_ID`.
        num_computed: leading positions whose keys and values are in the cache.
        num_committed: leading positions that the prefix cache has been offered.
        num_cached: prompt positions that were prefix-cache hits at the first admission.
        extent: where its keys and values are; None while it waits.
        block_hashes: of its full blocks, as far as they were needed.
        matcher: how far it has come in the request's grammar.
        prompt_logprobs: as far as they are computed; None where they are not asked for, or another choice has them.
    """

    request: EngineRequest
    index: int
    token_ids: list[int]
    num_computed: int = 0
    num_committed: int = 0
    num_cached: int | None = None
    extent: Extent | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    matcher: Matcher | None = None
    prompt_logprobs: PromptLogprobs | None = None

    def __post_init__(self) -> None:
        if self.request.grammar is not None:
            self.matcher = self.request.grammar.matcher(self.request.end_tokens)
        if self.request.sampling.prompt_logprobs is not None and self.index == 0:
            first = self.token_ids[0]
            self.prompt_logprobs = [None if first == IMAGE_TOKEN_ID else RawLogprob(first, math.nan)]

    @property
    def num_prompt(self) -> int:
        return self.request.prompt.num_tokens

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Positions that must be computed before the next token can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_fixed(self) -> int:
        """Leading positions whose tokens never change. A beam's output tokens may."""
        return self.num_prompt if self.request.sampling.num_beams > 1 else len(self.token_ids)

    @property
    def num_reusable(self) -> int:
        """Leading positions that may come from the prefix cache. At least one is left to compute, and so is each whose
        logits give a log-probability of the prompt that is not known yet."""
        most = min(self.num_fixed, len(self.token_ids) - 1)
        known = self.prompt_logprobs
        return most if known is None or len(known) == self.num_prompt else len(known) - 1

    @property
    def max_length(self) -> int:
        """The most positions that it can need: the last sampled token needs none."""
        return self.num_prompt + self.request.max_new_tokens - 1

    @property
    def expected_length(self) -> int:
        """The positions that it probably needs, to choose its place by: most answers end long before the context does.
        An answer that passes the estimate is expected to become twice as long as it is."""
        return min(self.max_length, self.num_prompt + max(_EXPECTED_OUTPUT, 2 * self.num_output) - 1)


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """Sequences that are admitted, preempted and advanced together: one for a choice, `num_beams` for a beam search.

    Attributes:
        arrival: its place in the order of arrival.
        sequences: each holds the prompt; until they are forked only the first is computed, for all.
        forked: the sequences have output tokens of their own.
        pins: digests of the images whose features its prefill still needs.
        timeline: when it came to its stages.
    """

    request: EngineRequest
    arrival: int
    sequences: list[Sequence]
    forked: bool = False
    pins: tuple[str, ...] = ()
    timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.timeline = Timeline(self.request.arrived)

    @property
    def active(self) -> list[Sequence]:
        """The sequences that are computed."""
        return self.sequences if self.forked else self.sequences[:1]

    @property
    def images_end(self) -> int:
        """Positions up to the end of the last image."""
        return max((end for _, end in self.request.prompt.image_spans), default=0)

    @property
    def batch(self) -> bool:
        """It is batch work: online groups go before it, and take its place."""
        return is_batch(self.request.priority)

    @property
    def rank(self) -> tuple[int, int]:
        """The lower is admitted first and preempted last."""
        return (self.request.priority, self.arrival)
