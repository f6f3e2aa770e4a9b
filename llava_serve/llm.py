"""LLM: answers many prompts offline, batched by one engine, in the caller's thread."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack, overload

from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.config import (
    EngineOptions,
    ImageOptions,
    ModelKeywords,
    ModelOptions,
    resolve_image_options,
    resolve_model_options,
)
from llava_serve.deadline import check_deadline, deadline_in
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.build import build_engine
from llava_serve.engine.output_processor import OutputProcessor, collect
from llava_serve.engine.sequence import EngineRequest
from llava_serve.errors import LlavaServeError
from llava_serve.inputs import (
    CallOptions,
    Images,
    as_images,
    images_and_sampling,
    images_of_each,
    is_one_conversation,
    sampling_of_each,
)
from llava_serve.openai_messages import ChatMessage
from llava_serve.processor import Processor
from llava_serve.results import GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, PreparedPrompt


class LLM:
    """A model and its engine, stepped in the caller's thread until the answers are complete. Not thread-safe.

    Args:
        model: `builtin`, a folder, or a hub id in the local cache; or all options of a model.
        engine: limits of the engine; None takes the defaults.
        image_options: which images are accepted; None takes the defaults.
        images: the deprecated name of `image_options`.
        keywords: the other fields of `ModelOptions`.

    Raises:
        CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | ModelOptions = "builtin",
        *,
        engine: EngineOptions | None = None,
        image_options: ImageOptions | None = None,
        images: ImageOptions | None = None,
        **keywords: Unpack[ModelKeywords],
    ) -> None:
        self.engine: Engine = build_engine(resolve_model_options(model, **keywords), engine or EngineOptions())
        self.spec: CheckpointSpec = self.engine.model.spec
        self.processor = Processor(self.spec, resolve_image_options(image_options, images))
        self._answers: dict[str, _Answer] = {}

    @overload
    def generate(
        self,
        query: str,
        images: Images = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        query: list[str] | tuple[str, ...],
        images: Sequence[Images] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[CallOptions],
    ) -> list[GenerationResult]: ...

    def generate(
        self, query: str | Sequence[str], images: Any = None, sampling: Any = None, **options: Unpack[CallOptions]
    ) -> GenerationResult | list[GenerationResult]:
        """Answers one query, or a list of them batched by the engine.

        Args:
            query: `<image-placeholder>` marks where an image goes; without it, each image stands before the text.
            images: for one query an image, a list of them, or None; for a list of queries one such entry each.
            sampling: for a list of queries one for all, or one each.
            options: `conv_mode`, `timeout` in seconds and `priority`.

        Raises:
            RequestError: an input is not valid; nothing has been generated.
            DeadlineExceededError: the deadline passed before all answers were complete.
        """
        queries = [query] if isinstance(query, str) else list(query)
        each = [as_images(images)] if isinstance(query, str) else images_of_each(images, len(queries))
        results = self._answer_all(list(zip(queries, each, strict=True)), sampling, options)
        return results[0] if isinstance(query, str) else results

    @overload
    def chat(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> GenerationResult: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[ChatMessage]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[CallOptions],
    ) -> list[GenerationResult]: ...

    def chat(
        self, messages: Sequence[Any], sampling: Any = None, **options: Unpack[CallOptions]
    ) -> GenerationResult | list[GenerationResult]:
        """Answers a conversation, or a list of them batched by the engine.

        Args:
            messages: OpenAI's form, or `Message`s.
            sampling: for a list of conversations one for all, or one each.
            options: as `generate`.

        Raises:
            RequestError: a message is not valid; nothing has been generated.
            DeadlineExceededError: as `generate`.
        """
        single = is_one_conversation(messages)
        conversations = [messages] if single else messages
        results = self._answer_all([(each, ()) for each in conversations], sampling, options)
        return results[0] if single else results

    def stream(
        self,
        asked: str | Sequence[ChatMessage] | PreparedPrompt,
        images: Any = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> Generator[Chunk]:
        """Answers a query or a conversation chunk by chunk; several streams may be open. Closing the iterator
        aborts the request.

        Args:
            asked: a query, or messages. A `PreparedPrompt` with its sampling is the deprecated form of
                `generate_prepared`.
            images: of a query, as in `generate`; after messages the sampling may be given here.
            options: as `generate`.

        Raises:
            RequestError: an input is not valid; raised by the call itself.
            DeadlineExceededError: the deadline passed before the answer was complete.
        """
        if isinstance(asked, PreparedPrompt):
            warnings.warn("stream(prepared, ...) is called generate_prepared now.", DeprecationWarning, stacklevel=2)
            return self.generate_prepared(asked, images or sampling)
        images, sampling = images_and_sampling(images, sampling)
        deadline = deadline_in(options.get("timeout"))
        prepared = self._prepare(asked, images, options.get("conv_mode"), deadline)
        return self.generate_prepared(prepared, sampling, deadline=deadline, priority=options.get("priority", 0))

    def generate_prepared(
        self,
        prepared: PreparedPrompt,
        sampling: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        priority: int = 0,
    ) -> Generator[Chunk]:
        """Answers a prepared prompt chunk by chunk, as `stream` does.

        Args:
            deadline: seconds since the epoch.
        """
        request = self._accept(prepared, sampling or SamplingParams(), deadline, priority)
        answer = self._open(request)
        try:
            while not answer.ended or answer.has_output:
                while not answer.has_output:
                    self._step()
                yield from answer.take()
        finally:
            self._close(request)

    def run(
        self,
        prepared: Iterable[PreparedPrompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        deadline: float | None = None,
        priority: int = 0,
    ) -> list[GenerationResult]:
        """Answers prepared prompts, batched by the engine, in their order."""
        prompts = list(prepared)
        requests = [
            self._accept(prompt, each, deadline, priority)
            for prompt, each in zip(prompts, sampling_of_each(sampling, len(prompts)), strict=True)
        ]
        answers: list[_Answer] = []
        try:
            while len(answers) < len(requests) or not all(answer.ended for answer in answers):
                while len(answers) < len(requests) and self.engine.has_room(requests[len(answers)]):
                    answers.append(self._open(requests[len(answers)]))
                self._step()
        finally:
            for request in requests:
                self._close(request)
        return [collect(request.prompt, answer.take()) for request, answer in zip(requests, answers, strict=True)]

    def _answer_all(
        self, asked: list[tuple[Any, Sequence[Any]]], sampling: Any, options: CallOptions
    ) -> list[GenerationResult]:
        """Answers queries with their images, or conversations, in their order."""
        samplings = sampling_of_each(sampling, len(asked))
        deadline = deadline_in(options.get("timeout"))
        prepared = [self._prepare(each, images, options.get("conv_mode"), deadline) for each, images in asked]
        return self.run(prepared, samplings, deadline=deadline, priority=options.get("priority", 0))

    def _prepare(
        self,
        asked: str | Sequence[ChatMessage],
        images: Sequence[Any],
        conv_mode: str | None,
        deadline: float | None,
    ) -> PreparedPrompt:
        check = partial(check_deadline, deadline)
        return self.processor.prepare(self.processor.read(asked, images), conv_mode=conv_mode, check=check)

    def _accept(
        self, prompt: PreparedPrompt, sampling: SamplingParams, deadline: float | None, priority: int
    ) -> EngineRequest:
        return self.engine.validator.accept(uuid.uuid4().hex, prompt, sampling, deadline=deadline, priority=priority)

    def _open(self, request: EngineRequest) -> _Answer:
        self.engine.add(request)
        answer = _Answer(OutputProcessor(self.processor.tokenizer, request))
        self._answers[request.request_id] = answer
        return answer

    def _close(self, request: EngineRequest) -> None:
        self.engine.abort(request.request_id)
        self._answers.pop(request.request_id, None)

    def _step(self) -> None:
        """Steps the engine, and adds the new chunks to their answers."""
        for output in self.engine.step():
            answer = self._answers[output.request_id]
            if answer.error is not None or output.error is not None:
                answer.error = answer.error or output.error
                continue
            try:
                chunk = answer.processor.push(output)
            except LlavaServeError as error:
                answer.error = error
                self.engine.abort(output.request_id)
                continue
            if chunk is None:
                continue
            if chunk.finish_reason is not None and output.finish_reason is None:
                self.engine.abort(output.request_id, output.index)
            answer.chunks.append(chunk)


@dataclass(slots=True)
class _Answer:
    """The chunks of an answer that have not been taken yet; `error`: why no more will come."""

    processor: OutputProcessor
    chunks: list[Chunk] = field(default_factory=list)
    error: LlavaServeError | None = None

    @property
    def ended(self) -> bool:
        """No more chunks will come."""
        return self.processor.done or self.error is not None

    @property
    def has_output(self) -> bool:
        """`take` has chunks to return, or an error to raise."""
        return bool(self.chunks) or self.error is not None

    def take(self) -> list[Chunk]:
        """Returns the new chunks. Raises the error that ended the answer."""
        if self.error is not None:
            raise self.error
        taken, self.chunks = self.chunks, []
        return taken
