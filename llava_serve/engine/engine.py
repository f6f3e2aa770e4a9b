"""The engine: adds and aborts requests, and advances all of them one step at a time."""

from __future__ import annotations

import logging
import time

import torch

from llava_serve.config import EngineOptions, is_batch
from llava_serve.engine.batch_share import BatchShare
from llava_serve.engine.beam import BeamSearch, Extension, Hypothesis
from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.engine.executor.background_compile import BackgroundCompile
from llava_serve.engine.executor.kv_memory import num_blocks
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.executor.model_runner import ModelRunner
from llava_serve.engine.failures import failed_requests, request_failure
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.online_load import online_load
from llava_serve.engine.prefill_budget import CUDA_MIN_TOKENS, MIN_TOKENS, PrefillBudget
from llava_serve.engine.request_validation import RequestValidator
from llava_serve.engine.scheduler import Schedule, Scheduler
from llava_serve.engine.sequence import EngineRequest, Output, PromptLogprobs, RawLogprob, Sequence, SequenceGroup
from llava_serve.engine.stats import Counts, EngineStats
from llava_serve.engine.step_limit import StepLimit
from llava_serve.engine.step_pipeline import LaunchedStep, StepPipeline
from llava_serve.errors import CapacityError, DeadlineExceededError, NumericalError, RequestError
from llava_serve.types import FinishReason, StageTimes

_logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model. One thread owns it; nothing here waits or locks.

    Args:
        ahead: steps are launched one ahead: see `StepPipeline`. None is on CUDA; it brings nothing on a CPU.
    """

    def __init__(self, model: VisionLanguageModel, options: EngineOptions, *, ahead: bool | None = None) -> None:
        self.model = model
        spec = model.spec
        self._kv = KVCache(
            num_blocks(model, options),
            options.block_size,
            prefix_caching=options.prefix_caching,
            salt=f"{spec.path}|{spec.base}|{spec.adapter}|{model.dtype}|{options.kv_cache_dtype}".encode(),
        )
        per_tile = spec.image.features_per_tile * spec.feature_width * model.dtype.itemsize
        self._encoder_cache = EncoderCacheManager(options.feature_cache_bytes // per_tile)
        self._scheduler = Scheduler(self._kv, self._encoder_cache, options.max_num_seqs)
        self.step_limit = StepLimit()
        self._runner = ModelRunner(model, self._kv.num_blocks, options)
        least, most = {"cuda": CUDA_MIN_TOKENS}.get(model.device.type, MIN_TOKENS), options.max_batch_tokens
        self._prefill_budget = PrefillBudget(most, options.max_batch_tiles, least, self._runner.padded)
        self._batch_share = BatchShare(self._prefill_budget)
        self._prefill_budget.observe(self._runner.warm_up(), 0, 0, 1)
        self._searches: dict[str, BeamSearch] = {}
        ahead = model.device.type == "cuda" if ahead is None else ahead
        self._pipeline = StepPipeline(self._runner, self._scheduler, self._kv, self._searches, ahead=ahead)
        vocabulary = model.language_model.get_input_embeddings().num_embeddings
        self.validator = RequestValidator(spec, options, vocabulary, self._kv.num_blocks)
        self._groups: dict[str, list[SequenceGroup]] = {}
        self._arrivals = self._num_sequences = self._num_batch = 0
        self._counts, self._read_at = Counts(), 0.0  # when the last step was read

    def compile_in_background(self) -> BackgroundCompile | None:
        """Begins what `compile: auto` means: who drives the engine calls `switch` between steps, and `close`."""
        return self._runner.compile_in_background()

    @property
    def has_work(self) -> bool:
        """There are requests to advance."""
        return bool(self._groups)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended. Any thread may read it."""
        return len(self._groups)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=len(self._scheduler.waiting),
            free_blocks=self._kv.num_available,
            total_blocks=self._kv.num_blocks,
            slow_attention=self._runner.slow_attention,
            preemptions=self._scheduler.preemptions,
            queried_images=self._encoder_cache.num_queries,
            cached_images=self._encoder_cache.num_hits,
            prefill_tokens_per_s=self._prefill_budget.tokens_per_s,
            prefill_seconds=self._prefill_budget.prefill_seconds,
            online=online_load(self._scheduler, self._kv.num_blocks),
            **vars(self._counts),
        )

    def add(self, request: EngineRequest) -> None:
        """Queues a request that `validator` has accepted.

        Raises:
            CapacityError: the queue is full.
            RequestError: a request of this id is in the engine.
        """
        if not self.has_room(request):
            raise CapacityError("The server is busy; try again later.", reason="engine_queue")
        if request.request_id in self._groups:
            raise RequestError(f"A request with the id {request.request_id} is still running.")
        tokens = request.prompt.token_ids.tolist()
        groups = []
        for index in range(request.sampling.n):
            sequences = [Sequence(request, index, list(tokens)) for _ in range(request.sampling.num_beams)]
            groups.append(SequenceGroup(request, self._arrivals + index, sequences))
        for group in groups:
            self._scheduler.add(group)
        self._arrivals += len(groups)
        if request.sampling.num_beams > 1:
            self._searches[request.request_id] = BeamSearch(groups[0])
        self._groups[request.request_id] = groups
        self._num_sequences += request.num_sequences
        self._num_batch += is_batch(request.priority) * request.num_sequences

    def has_room(self, request: EngineRequest, coming: int = 0) -> bool:
        """The queue has room for all sequences of a request behind `coming` others: an online one is added as if there
        were no batch work. An empty engine takes any request. Any thread may call it."""
        if not self._groups and not coming:
            return True
        batch, most = is_batch(request.priority), self.validator.max_sequences
        taken = coming + (self._num_sequences if batch else self._num_sequences - self._num_batch)
        return taken + request.num_sequences <= (self.validator.max_batch_sequences if batch else most)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one choice of it, without further output. Unknown ones have ended and are ignored."""
        for group in list(self._groups.get(request_id, ())):
            if index is None or group.sequences[0].index == index:
                self._end(group)

    def has(self, request_id: str) -> bool:
        """The request has not ended."""
        return request_id in self._groups

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Advances every decoding sequence by a token, and prompts within the budget."""
        started = time.perf_counter()
        outputs = self._expire()
        step = self._pipeline.launch(self._schedule)
        self.step_limit.begin(*step.schedule.work)  # it may have been launched one ahead
        outputs += self._postprocess(step)
        ended = time.perf_counter()
        self._counts.step_seconds += ended - started
        self._observe(step.schedule, ended - max(step.began, self._read_at))
        self._read_at = ended
        return outputs

    def _schedule(self) -> Schedule:
        """The next step, where none is launched."""
        started = time.perf_counter()
        self._scheduler.make_room(self._prefill_budget.step_budget(self._scheduler.load.online_decoding).tokens)
        schedule = self._scheduler.schedule(self._batch_share.step_budget(self._scheduler.load))
        self.step_limit.begin(*schedule.work)
        self._counts.schedule_seconds += time.perf_counter() - started
        return schedule

    def _observe(self, schedule: Schedule, seconds: float) -> None:
        """Learns what steps cost."""
        self.step_limit.end(seconds)
        self._counts.steps += 1
        self._counts.computed_sequences += len(schedule.segments)
        (decoding, prefill, tiles), batch = schedule.work, schedule.num_batch_decoding
        self._prefill_budget.observe(seconds, decoding, prefill, tiles)
        self._batch_share.observe(seconds, decoding - batch, batch, prefill + tiles)

    def _expire(self) -> list[Output]:
        """Ends the requests whose deadline has passed."""
        now = time.time()
        expired = [
            request_id
            for request_id, groups in self._groups.items()
            if (deadline := groups[0].request.deadline) is not None and deadline <= now
        ]
        for request_id in expired:
            self.abort(request_id)
        self._counts.expired += len(expired)
        error = DeadlineExceededError("The request's time was up before its answer was complete.")
        return [Output(request_id, 0, error=error) for request_id in expired]

    def _postprocess(self, step: LaunchedStep) -> list[Output]:
        """Reads the next tokens and appends them. What a failed request has computed is not kept."""
        encoded = {job.digest for job in step.schedule.tile_jobs}
        for group in self._scheduler.running:
            group.credit_vision(encoded, step.result.vision_s)
        sampled = step.sampling.read()
        outputs = [self._fail(*failed) for failed in failed_requests(sampled.failures, self._scheduler).items()]
        self._record(step.schedule, step.result.prompt_logprobs)
        for sequence, token in sampled.tokens:
            if sequence.is_running:
                outputs.append(self._append(sequence, token))
        for search, extended in sampled.beams:
            if self.has(search.group.request.request_id):
                outputs += self._advance_beams(search.group, extended)
        return outputs

    def _fail(self, request_id: str, error: Exception) -> Output:
        """Ends a request with an error."""
        if isinstance(error, NumericalError):
            _logger.warning("Request %s has failed: %s", request_id, error)
            for group in self._groups[request_id]:
                self._scheduler.discard_images(group)
        self.abort(request_id)
        return Output(request_id, 0, error=request_failure(request_id, error))

    def _record(self, schedule: Schedule, prompt_logprobs: list[tuple[Sequence, PromptLogprobs]]) -> None:
        """Records what the step has computed."""
        for sequence, new in prompt_logprobs:
            assert sequence.prompt_logprobs is not None, "they are computed only where they are asked for"
            sequence.prompt_logprobs += new
        self._counts.computed_tokens += schedule.num_tokens
        for segment in schedule.segments:
            if segment.sequence.is_running:
                segment.sequence.num_computed = segment.end
                self._kv.commit(segment.sequence)
        for group in self._scheduler.running:
            if group.pins and all(sequence.num_computed >= group.images_end for sequence in group.active):
                self._scheduler.unpin_images(group)

    def _append(self, sequence: Sequence, token: RawLogprob) -> Output:
        """Appends a sequence's next token, and ends its choice where that is the last one."""
        request = sequence.request
        if not request.max_new_tokens:
            return self._output(sequence, (), "length", None)
        sequence.token_ids.append(token.token_id)
        complete = sequence.matcher is not None and sequence.matcher.exhausted
        stopped = complete or token.token_id in request.stop_token_ids
        full = sequence.num_output >= request.max_new_tokens
        reason: FinishReason | None = "stop" if stopped else "length" if full else None
        logprobs = None if request.sampling.logprobs is None else (token,)
        return self._output(sequence, (token.token_id,), reason, logprobs)

    def _advance_beams(self, group: SequenceGroup, result: list[Extension] | Hypothesis) -> list[Output]:
        """Applies a step of a beam search. Its output comes as a whole, at its end."""
        if isinstance(result, Hypothesis):
            return [self._output(group.sequences[0], result.token_ids, "stop" if result.ended else "length", None)]
        for extension in result:
            if extension.beam != extension.parent:
                self._kv.fork(group.sequences[extension.parent], group.sequences[extension.beam])
        for extension in result:
            group.sequences[extension.beam].token_ids.append(extension.token)
        group.forked = True
        return []

    def _output(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        logprobs: tuple[RawLogprob, ...] | None,
    ) -> Output:
        """The output of a choice; ends it where there is a finish reason."""
        # A beam search has one output, of tokens that need not be the sequence's own.
        first = sequence.num_output == len(token_ids) or sequence.request.sampling.num_beams > 1
        stages = self._first_output(sequence) if first else ()
        self._counts.generated_tokens += len(token_ids)
        if reason is not None:
            self.abort(sequence.request.request_id, sequence.index)
        return Output(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            finish_reason=reason,
            logprobs=logprobs,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached or 0,
            prompt_logprobs=sequence.prompt_logprobs if first else None,
            stages=stages,
        )

    def _first_output(self, sequence: Sequence) -> StageTimes:
        """Counts the prompt of a choice that has its first output; returns the stages that led there."""
        self._counts.add_prompt(sequence.request.prompt, sequence.num_cached or 0, first=sequence.index == 0)
        groups = self._groups[sequence.request.request_id]
        return next(group for group in groups if group.sequences[0].index == sequence.index).timeline.stages()

    def _end(self, group: SequenceGroup) -> None:
        """Removes a group from the engine and frees what it holds."""
        self._scheduler.remove(group)
        self._num_sequences -= len(group.sequences)
        self._num_batch -= group.batch * len(group.sequences)
        self._searches.pop(group.request.request_id, None)
        for sequence in group.sequences:
            self._runner.release(sequence)
        groups = self._groups[group.request.request_id]
        groups.remove(group)
        if not groups:
            del self._groups[group.request.request_id]
