"""Launches steps: on CUDA each one before the one that precedes it is read, so that the GPU has work meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llava_serve.engine.beam import BeamSearch
from llava_serve.engine.executor.model_runner import ModelRunner
from llava_serve.engine.executor.sampling_step import PendingStep
from llava_serve.engine.executor.step_result import StepResult
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.scheduler import Schedule, Scheduler
from llava_serve.engine.step_ahead import planned_ahead


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose tokens are not read. `began`: seconds of `time.perf_counter()`, its schedule included."""

    schedule: Schedule
    result: StepResult
    sampling: PendingStep
    began: float


class StepPipeline:
    """Runs steps in order, each as soon as it can be.

    Args:
        searches: the beam searches that run, by request id.
        ahead: a step may be launched before the one that precedes it is read.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        kv: KVCache,
        searches: Mapping[str, BeamSearch],
        *,
        ahead: bool,
    ) -> None:
        self._runner, self._scheduler, self._kv = runner, scheduler, kv
        self._searches = searches
        self.ahead = ahead
        self._next: LaunchedStep | None = None

    def launch(self, schedule: Callable[[], Schedule]) -> LaunchedStep:
        """The next step, to be read: launched before, or now, by the schedule. The one behind it is launched as well,
        where it can be."""
        step, self._next = self._next, None
        if step is None or not any(segment.sequence.is_running for segment in step.schedule.segments):
            began = time.perf_counter()
            step = self._launch(schedule(), began)
        if self.ahead and (ids := step.sampling.ids) is not None:
            began = time.perf_counter()
            with planned_ahead(step.schedule, self._scheduler, self._kv) as following:
                if following is not None:
                    chosen = to_device(torch.tensor(following.indices), ids.device)
                    self._next = self._launch(following.schedule, began, ids.index_select(0, chosen))
        return step

    def _launch(self, schedule: Schedule, began: float, sampled: torch.Tensor | None = None) -> LaunchedStep:
        result = self._runner.run(schedule, sampled)
        sequences = [segment.sequence for segment in schedule.segments if segment.needs_sampling]
        pending = PendingStep(result, sequences, self._searches, self._runner.dtype, float8=self._runner.float8)
        return LaunchedStep(schedule, result, pending, began)
