"""The engine: add and abort requests, and advance all of them by one step at a time."""

from __future__ import annotations

import logging
import time

import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.beam import BeamSearch, Extension, Hypothesis
from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.engine.executor.draw import draw
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.executor.model_runner import ModelRunner, StepResult, num_blocks
from llava_serve.engine.failures import request_failure
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.prefill_budget import PrefillBudget
from llava_serve.engine.request_validation import RequestValidator
from llava_serve.engine.scheduler import Schedule, Scheduler
from llava_serve.engine.sequence import EngineRequest, Group, Output, RawLogprob, Sequence
from llava_serve.engine.stats import EngineStats
from llava_serve.errors import CapacityError, DeadlineExceededError, NumericalError, RequestError
from llava_serve.types import FinishReason

_logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model. One thread owns it; nothing here waits or locks."""

    def __init__(self, model: VisionLanguageModel, options: EngineOptions) -> None:
        self.model = model
        spec = model.spec
        self._kv = KVCache(
            num_blocks(model, options),
            options.block_size,
            prefix_caching=options.prefix_caching,
            salt=f"{spec.path}|{spec.base}|{spec.adapter}|{model.dtype}".encode(),
        )
        per_tile = spec.image.features_per_tile * int(spec.vision_config["hidden_size"]) * model.dtype.itemsize
        features = EncoderCacheManager(options.feature_cache_bytes // per_tile)
        self._scheduler = Scheduler(self._kv, features, options.max_num_seqs)
        self._pacer = PrefillBudget(options.max_batch_tokens, options.max_batch_tiles)
        self._runner = ModelRunner(model, self._kv.num_blocks, options)
        self._pacer.observe(self._runner.warm_up(), 0, 0, 1)
        vocabulary = model.language_model.get_input_embeddings().num_embeddings
        self.limits = RequestValidator(spec, options, vocabulary, self._kv.num_blocks)
        self._groups: dict[str, list[Group]] = {}
        self._searches: dict[str, BeamSearch] = {}
        self._arrivals = self._num_sequences = 0
        self._steps = self._cached = self._computed = self._generated = 0

    @property
    def has_work(self) -> bool:
        """A step would advance something."""
        return bool(self._groups)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended. Any thread may look."""
        return len(self._groups)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=len(self._scheduler.waiting),
            free_blocks=self._kv.num_available,
            total_blocks=self._kv.num_blocks,
            cached_tokens=self._cached,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            steps=self._steps,
        )

    def add(self, request: EngineRequest) -> None:
        """Queues a request that `limits` has accepted.

        Raises:
            CapacityError: the queue is full.
            RequestError: a request of this id is in the engine.
        """
        if not self.has_room(request):
            raise CapacityError("The server is busy; try again later.")
        if request.request_id in self._groups:
            raise RequestError(f"A request with the id {request.request_id} is still running.")
        tokens = request.prompt.token_ids.tolist()
        groups = []
        for index in range(request.sampling.n):
            rows = [Sequence(request, index, list(tokens)) for _ in range(request.sampling.num_beams)]
            groups.append(Group(request, self._arrivals + index, rows))
        for group in groups:
            self._scheduler.add(group)
        self._arrivals += len(groups)
        if request.sampling.num_beams > 1:
            self._searches[request.request_id] = BeamSearch(groups[0])
        self._groups[request.request_id] = groups
        self._num_sequences += _num_sequences(request)

    def has_room(self, request: EngineRequest) -> bool:
        """The queue has place for all sequences of a request; where there is nobody else, for any."""
        return not self._groups or self._num_sequences + _num_sequences(request) <= self.limits.max_sequences

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one choice of it, without further output. Unknown ones are ignored: they have ended."""
        for group in list(self._groups.get(request_id, ())):
            if index is None or group.rows[0].index == index:
                self._end(group)

    def has(self, request_id: str) -> bool:
        """The request has not ended."""
        return request_id in self._groups

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Advances every live sequence by a token, and waiting prompts within the budget."""
        started, decoding = time.perf_counter(), self._scheduler.num_decoding
        outputs = self._expire()
        schedule = self._scheduler.schedule(self._pacer.budget(decoding))
        result = self._runner.run(schedule)
        outputs += self._postprocess(schedule, result)
        prefill = max(0, schedule.num_tokens - decoding)  # a row that could decode may still wait for a picture
        self._pacer.observe(time.perf_counter() - started, decoding, prefill, schedule.num_tiles)
        return outputs

    def _expire(self) -> list[Output]:
        """Ends the requests whose time is up."""
        now = time.time()
        late = [
            request_id
            for request_id, groups in self._groups.items()
            if (deadline := groups[0].request.deadline) is not None and deadline <= now
        ]
        for request_id in late:
            self.abort(request_id)
        error = DeadlineExceededError("The request's time was up before its answer was complete.")
        return [Output(request_id, 0, error=error) for request_id in late]

    def _postprocess(self, schedule: Schedule, result: StepResult) -> list[Output]:
        """Gives each sequence that draws its next token. What a failed request has computed is not kept."""
        drawing = [segment.sequence for segment in schedule.segments if segment.draws]
        drawn = draw(result, drawing, self._searches, self.model.dtype)
        outputs = [self._fail(request_id, error) for request_id, error in drawn.failures.items()]
        self._record(schedule)
        outputs += [self._append(row, token) for row, token in drawn.tokens if self.has(row.request.request_id)]
        for search, extended in drawn.beams:
            outputs += self._advance_beams(search.group, extended)
        return outputs

    def _fail(self, request_id: str, error: Exception) -> Output:
        """Ends a request with an error."""
        if isinstance(error, NumericalError):
            _logger.warning("Request %s has failed: %s", request_id, error)
            for group in self._groups[request_id]:
                self._scheduler.discard_pictures(group)
        self.abort(request_id)
        return Output(request_id, 0, error=request_failure(request_id, error))

    def _record(self, schedule: Schedule) -> None:
        """Enters what the step has computed."""
        self._steps += 1
        self._computed += schedule.num_tokens
        for segment in schedule.segments:
            if self.has(segment.sequence.request.request_id):
                segment.sequence.num_computed = segment.end
                self._kv.commit(segment.sequence)
        for group in self._scheduler.running:
            if group.pins and all(row.num_computed >= group.last_picture for row in group.active):
                self._scheduler.prefilled(group)

    def _append(self, row: Sequence, token: RawLogprob) -> Output:
        """Gives a row its next token and ends it where that was its last."""
        request = row.request
        row.token_ids.append(token.token_id)
        reason: FinishReason | None = None
        if token.token_id in request.stop_token_ids:
            reason = "stop"
        elif row.num_output >= request.max_new_tokens:
            reason = "length"
        logprobs = None if request.sampling.logprobs is None else (token,)
        return self._output(row, (token.token_id,), reason, logprobs)

    def _advance_beams(self, group: Group, result: list[Extension] | Hypothesis) -> list[Output]:
        """Carries out a step of a beam search; its answer comes as a whole, at its end."""
        if isinstance(result, Hypothesis):
            return [self._output(group.rows[0], result.token_ids, "stop" if result.ended else "length", None)]
        for extension in result:
            if extension.row != extension.parent:
                self._kv.fork(group.rows[extension.parent], group.rows[extension.row])
        for extension in result:
            group.rows[extension.row].token_ids.append(extension.token)
        group.prompted = True
        return []

    def _output(
        self,
        row: Sequence,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        logprobs: tuple[RawLogprob, ...] | None,
    ) -> Output:
        """Counts and wraps what a choice gave, and ends it where there is a reason."""
        cached = row.num_cached or 0
        self._generated += len(token_ids)
        if reason is not None:
            self._cached += cached
            self.abort(row.request.request_id, row.index)
        return Output(row.request.request_id, row.index, token_ids, reason, logprobs, row.num_prompt, cached)

    def _end(self, group: Group) -> None:
        """Takes a group out of the engine, with all that it holds."""
        self._scheduler.remove(group)
        self._num_sequences -= len(group.rows)
        self._searches.pop(group.request.request_id, None)
        for row in group.rows:
            self._runner.forget(row)
        groups = self._groups[group.request.request_id]
        groups.remove(group)
        if not groups:
            del self._groups[group.request.request_id]


def _num_sequences(request: EngineRequest) -> int:
    """Rows that a request takes."""
    return request.sampling.n * request.sampling.num_beams
