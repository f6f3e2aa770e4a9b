"""The engine: add and abort requests, and advance all of them by one step at a time."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.beam import BeamSearch, Hypothesis
from llava_serve.engine.features import FeatureLedger
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.memory import KVMemory
from llava_serve.engine.model import VisionLanguageModel
from llava_serve.engine.pacer import Pacer
from llava_serve.engine.runner import Runner, kv_shape
from llava_serve.engine.sampler import sample
from llava_serve.engine.scheduler import Schedule, Scheduler
from llava_serve.engine.sequence import EngineRequest, Group, Output, RawLogprob, Sequence
from llava_serve.errors import (
    CapacityError,
    DeadlineExceededError,
    PromptTooLongError,
    RequestError,
    UnsupportedParameterError,
)
from llava_serve.types import FinishReason, PreparedPrompt, SamplingParams


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where the engine stands.

    Attributes:
        running: rows in the cache.
        waiting: requests' groups that are not.
        free_blocks: blocks that no sequence holds; the prefix cache's count as free.
        cached_tokens: prompt positions that the prefix cache has saved since the start.
        computed_tokens: positions that were computed since the start.
        generated_tokens: tokens that were drawn since the start.
        steps: since the start.
        heartbeat_age_s: since the loop's last turn; 0 where no thread drives the engine.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    steps: int
    heartbeat_age_s: float = 0.0


class Engine:
    """Continuous batching over one model. One thread owns it; nothing here waits or locks."""

    def __init__(self, model: VisionLanguageModel, options: EngineOptions) -> None:
        self.model = model
        self._options = options
        layers, kv_heads, head_dim = kv_shape(model)
        per_block = options.block_size * KVMemory.bytes_per_position(layers, kv_heads, head_dim, model.dtype)
        self._num_blocks = max(1, options.kv_cache_bytes // per_block)
        spec = model.spec
        self._kv = KVCache(
            self._num_blocks,
            options.block_size,
            prefix_caching=options.prefix_caching,
            salt=f"{spec.path}|{spec.base}|{spec.adapter}|{model.dtype}".encode(),
        )
        per_tile = spec.image.features_per_tile * int(spec.vision_config["hidden_size"]) * model.dtype.itemsize
        features = FeatureLedger(options.feature_cache_bytes // per_tile)
        self._scheduler = Scheduler(self._kv, features, options.max_num_seqs)
        self._pacer = Pacer(options.max_batch_tokens, options.max_batch_tiles)
        self._runner = Runner(model, self._num_blocks * options.block_size, options.block_size)
        self._groups: dict[str, list[Group]] = {}
        self._searches: dict[Group, BeamSearch] = {}
        self._arrivals = 0
        self._steps = self._cached = self._computed = self._generated = 0

    @property
    def has_work(self) -> bool:
        """A step would advance something."""
        return bool(self._groups)

    @property
    def has_room(self) -> bool:
        """`add` would take a request."""
        return len(self._groups) < self._options.max_num_seqs + self._options.max_waiting

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=len(self._scheduler.waiting),
            free_blocks=self._kv.num_available,
            total_blocks=self._num_blocks,
            cached_tokens=self._cached,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            steps=self._steps,
        )

    def request(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        sampling: SamplingParams,
        *,
        deadline: float | None = None,
        priority: int = 0,
    ) -> EngineRequest:
        """Checks a request against the engine's limits, which never change: any thread may call this.

        Raises:
            PromptTooLongError: the prompt alone does not fit.
            RequestError: it asks for more rows than the engine has.
        """
        if sampling.num_beams > self._options.max_num_seqs:
            raise RequestError(f"num_beams must be at most {self._options.max_num_seqs} here.", "num_beams")
        if sampling.num_beams > 1 and sampling.logprobs is not None:
            raise UnsupportedParameterError("logprobs cannot be given with num_beams above 1.", "logprobs")
        memory = self._num_blocks // sampling.num_beams * self._options.block_size
        limit = min(self.model.spec.context_length, memory)
        if prompt.num_tokens >= limit:
            raise PromptTooLongError(prompt.num_tokens, limit - 1)
        ends = {*self.model.spec.eos_token_ids, *prompt.stop_token_ids}
        return EngineRequest(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            deadline=deadline,
            priority=priority,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            max_new_tokens=min(sampling.max_new_tokens, limit - prompt.num_tokens),
            stop_token_ids=frozenset() if sampling.ignore_eos else frozenset(ends),
        )

    def check_capacity(self, coming: int = 0) -> None:
        """Raises `CapacityError` if the house, with `coming` requests on their way, is full. Any thread may call it."""
        if len(self._groups) + coming >= self._options.max_num_seqs + self._options.max_waiting:
            raise CapacityError("The server is busy; try again later.")

    def add(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
            CapacityError: the queue is full.
            RequestError: a request of this id is in the engine.
        """
        self.check_capacity()
        if request.request_id in self._groups:
            raise RequestError(f"A request with the id {request.request_id} is still running.")
        tokens = request.prompt.token_ids.tolist()
        groups = []
        for index in range(request.sampling.n):
            rows = [Sequence(request, index, list(tokens)) for _ in range(request.sampling.num_beams)]
            groups.append(Group(request, self._arrivals, rows))
            if len(rows) > 1:
                self._searches[groups[-1]] = BeamSearch(groups[-1])
            self._arrivals += 1
        self._groups[request.request_id] = groups
        for group in groups:
            self._scheduler.add(group)

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
        outputs = self._expire()
        started, decoding = time.perf_counter(), self._scheduler.num_decoding
        schedule = self._scheduler.schedule(self._pacer.budget(decoding))
        logits = self._runner.run(schedule)
        self._record(schedule)
        rows = [segment.sequence for segment in schedule.segments if segment.draws]
        outputs += self._draw(rows, logits)
        self._steps += 1
        tiles = sum(len(job.tiles) for job in schedule.tile_jobs)
        self._pacer.observe(time.perf_counter() - started, decoding, schedule.num_tokens - decoding, tiles)
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

    def _record(self, schedule: Schedule) -> None:
        """Enters what the step has computed."""
        for segment in schedule.segments:
            segment.sequence.num_computed = segment.end
            self._computed += segment.end - segment.start
            self._kv.commit(segment.sequence)
        for group in self._scheduler.running:
            if group.pins and all(row.num_computed >= group.last_picture for row in group.active):
                self._scheduler.prefilled(group)

    def _draw(self, rows: list[Sequence], logits: torch.Tensor) -> list[Output]:
        """Gives each row its next token, of logits [rows, vocabulary]; beams move as one."""
        beams: dict[str, list[int]] = {}
        single = []
        for at, row in enumerate(rows):
            if row.request.sampling.num_beams > 1:
                beams.setdefault(row.request.request_id, []).append(at)
            else:
                single.append(at)
        outputs: list[Output] = []
        for request_id, places in beams.items():
            outputs += self._advance_beams(self._groups[request_id][0], logits[places])
        if single:
            drawn = sample(logits[single] if beams else logits, [rows[at] for at in single])
            outputs += [self._append(rows[at], token) for at, token in zip(single, drawn, strict=True)]
        return outputs

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

    def _advance_beams(self, group: Group, logits: torch.Tensor) -> list[Output]:
        """One step of a beam search; its answer comes as a whole, at its end."""
        search = self._searches[group]
        result = search.advance(logits)
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
        self._searches.pop(group, None)
        for row in group.rows:
            self._runner.forget(row)
        groups = self._groups[group.request.request_id]
        groups.remove(group)
        if not groups:
            del self._groups[group.request.request_id]
