"""Which requests an engine accepts."""

from __future__ import annotations

import random
from numbers import Integral, Real

import numpy as np

from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.config import EngineOptions
from llava_serve.engine.grammar import GrammarCompiler
from llava_serve.engine.sequence import EngineRequest
from llava_serve.errors import LlavaServeError, PromptTooLongError, RequestError, UnsupportedParameterError, shown
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import IMAGE_TOKEN_ID, PROMPT_VERSION, PreparedPrompt


class RequestValidator:
    """Checks requests before they reach the scheduler. Any thread may call it.

    Args:
        vocabulary: size of the model's embedding table.
        num_blocks: of the KV cache.

    Attributes:
        vocabulary: as given.
        grammars: compiles those of structured output.
    """

    def __init__(self, spec: CheckpointSpec, options: EngineOptions, vocabulary: int, num_blocks: int) -> None:
        self._spec = spec
        self._options = options
        self.vocabulary = vocabulary
        self._num_blocks = num_blocks
        self.grammars = GrammarCompiler(spec.tokenizer, vocabulary)
        self.set_max_waiting(options.max_waiting)

    def set_max_waiting(self, max_waiting: int) -> None:
        """Sets how many sequences may wait."""
        self.max_sequences = self._options.max_num_seqs + max_waiting
        self.max_batch_sequences = self._options.model_copy(update={"max_waiting": max_waiting}).max_batch_sequences

    def accept(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        sampling: SamplingParams,
        *,
        deadline: float | None = None,
        priority: int = 0,
    ) -> EngineRequest:
        """Validates a call and makes it a request. `max_new_tokens` is cut to what fits behind the prompt.

        Compiling a grammar takes from a millisecond to a second: not for a thread that others wait for.

        Args:
            deadline: seconds since the epoch.
            priority: a smaller number is served earlier.

        Raises:
            PromptTooLongError: the prompt alone does not fit the context or the cache.
            RequestError: it needs more beams than `max_num_seqs`, or its prompt was not prepared for this model,
                or its structured output cannot be followed, or an argument is of another type.
            LlavaServeError: the prompt was prepared by another release.
        """
        if prompt.version != PROMPT_VERSION:
            raise LlavaServeError(
                f"The prompt has layout {prompt.version} and this model replica reads layout {PROMPT_VERSION}: the "
                "tiers run different releases. Try again when the upgrade is complete."
            )
        # Of another type, they would fail the scheduler for all requests.
        if not isinstance(priority, Integral):
            raise RequestError(f"priority must be a whole number; got {shown(priority)}.", "priority")
        if not isinstance(deadline, Real | None):
            raise RequestError(f"deadline must be seconds since the epoch; got {shown(deadline)}.", "deadline")
        if sampling.num_beams > self._options.max_num_seqs:
            raise RequestError(f"num_beams must be at most {self._options.max_num_seqs} here.", "num_beams")
        for name in ("logprobs", "prompt_logprobs"):
            if sampling.num_beams > 1 and getattr(sampling, name) is not None:
                raise UnsupportedParameterError(f"{name} cannot be given with num_beams above 1.", name)
        memory = self._num_blocks // sampling.num_beams * self._options.block_size
        limit = min(self._spec.context_length, memory)
        if prompt.num_tokens >= limit:
            raise PromptTooLongError(prompt.num_tokens, limit - 1)
        self._check_prompt(prompt)
        self._check_token_ids(sampling)
        ends = (*self._spec.eos_token_ids, *prompt.stop_token_ids)
        end_tokens = frozenset(token for token in ends if 0 <= token < self.vocabulary)
        form = sampling.structured
        return EngineRequest(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            deadline=deadline,
            priority=priority,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            max_new_tokens=min(sampling.max_new_tokens, limit - prompt.num_tokens),
            stop_token_ids=frozenset(sampling.stop_token_ids) | (set() if sampling.ignore_eos else end_tokens),
            end_tokens=end_tokens,
            grammar=None if form is None else self.grammars.compile(form, continues=prompt.continues),
        )

    def _check_token_ids(self, sampling: SamplingParams) -> None:
        """Refuses ids that the model has no token for."""
        for name, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias or ())):
            if any(token >= self.vocabulary for token in ids):
                raise RequestError(f"{name} has an id that is not below {self.vocabulary}.", name)

    def _check_prompt(self, prompt: PreparedPrompt) -> None:
        """Refuses a prompt that another model's processor made: it would fail the engine for all requests."""
        ids = prompt.token_ids
        num_images = len(prompt.image_spans)
        tile = (*self._spec.image.crop_size, 3)
        in_spans = np.zeros(len(ids), dtype=bool)
        for start, end in prompt.image_spans:
            in_spans[start:end] = True
        valid = (
            len(ids) > 0
            and num_images == len(prompt.tiles) == len(prompt.image_sizes) == len(prompt.digests)
            and bool((in_spans == (ids == IMAGE_TOKEN_ID)).all())
            and bool(((ids >= 0) | in_spans).all())
            and int(ids.max()) < self.vocabulary
            and all(0 <= start < end <= len(ids) for start, end in prompt.image_spans)
            and all(tiles.shape[1:] == tile and tiles.dtype == np.uint8 for tiles in prompt.tiles)
        )
        if not valid:
            raise RequestError("The prompt was prepared for another model.")
