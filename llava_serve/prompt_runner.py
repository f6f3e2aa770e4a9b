"""Answers any number of prompts by one engine, stepped in the caller's thread."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import closing

from llava_serve.deadline import check_deadline, deadline_in
from llava_serve.engine.answers import Answer, OpenAnswers
from llava_serve.engine.engine import Engine
from llava_serve.engine.failures import request_failure
from llava_serve.engine.output_processor import collect
from llava_serve.engine.sequence import EngineRequest
from llava_serve.errors import LlavaServeError
from llava_serve.images.decoder import Check
from llava_serve.inputs import Prompt, as_images
from llava_serve.prepare_ahead import PrepareAhead
from llava_serve.processor import Processor
from llava_serve.results import GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt


class PromptRunner:
    """Prepares prompts in threads as the engine has room, and steps the engine meanwhile.

    Args:
        window: the most prompts in memory at once: those that the engine works on, and those that follow.
    """

    def __init__(self, engine: Engine, processor: Processor, answers: OpenAnswers, window: int) -> None:
        self._engine = engine
        self._processor = processor
        self._answers = answers
        self._window = window

    def run(
        self, prompts: Iterable[Prompt], deadline: float | None
    ) -> Generator[tuple[int, GenerationResult | Exception]]:
        """Answers prompts as they come, and gives each with its number as it is finished, or why it failed.

        Args:
            deadline: of all prompts without a timeout, in seconds since the epoch.
        """

        def prepare(prompt: Prompt, check_open: Check) -> EngineRequest:
            own = deadline if prompt.timeout is None else deadline_in(prompt.timeout)

            def check() -> None:
                check_open()
                check_deadline(own)

            return self.accept(self._prepare(prompt, check), prompt.sampling, own, prompt.priority)

        waiting: deque[tuple[int, EngineRequest]] = deque()
        running: dict[int, Answer] = {}
        with closing(PrepareAhead(prompts, prepare, self._window, os.cpu_count() or 1)) as ahead:
            try:
                while ahead.fill():
                    for index, request in ahead.ready(wait=not running and not waiting):
                        if isinstance(request, EngineRequest):
                            waiting.append((index, request))
                            continue
                        ahead.finish()
                        yield index, request
                    while waiting and self._engine.has_room(waiting[0][1]):
                        index, request = waiting.popleft()
                        running[index] = self._answers.open(request)
                    if running or waiting:
                        self._answers.step()
                    for index in [index for index, answer in running.items() if answer.ended]:
                        answer = running.pop(index)
                        self._answers.close(answer)
                        ahead.finish()
                        yield index, answer.error or collect(answer.request.prompt, answer.take())
            finally:
                for answer in running.values():
                    self._answers.close(answer)

    def accept(
        self, prompt: PreparedPrompt, sampling: SamplingParams | None, deadline: float | None, priority: int
    ) -> EngineRequest:
        """Makes a request of a prepared prompt; see `RequestValidator.accept`."""
        request_id, sampling = uuid.uuid4().hex, sampling or SamplingParams()
        return self._engine.validator.accept(request_id, prompt, sampling, deadline=deadline, priority=priority)

    def _prepare(self, prompt: Prompt, check: Check) -> PreparedPrompt:
        asked = prompt.asked
        if isinstance(asked, PreparedPrompt):
            return asked
        check()
        read = asked() if callable(asked) else self._processor.read(asked, as_images(prompt.images))
        return self._processor.prepare(read, conv_mode=prompt.conv_mode, check=check)


def as_result(index: int, outcome: GenerationResult | Exception) -> GenerationResult | LlavaServeError:
    """The result of a prompt; an unexpected error is logged."""
    return request_failure(f"of prompt {index}", outcome) if isinstance(outcome, Exception) else outcome
