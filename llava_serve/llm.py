"""LLM: answers many prompts offline, batched by one engine, in the caller's thread."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.config import Dtype, EngineOptions, ImageOptions, ModelOptions
from llava_serve.engine.build import build_engine
from llava_serve.engine.engine import Engine
from llava_serve.engine.sequence import EngineRequest
from llava_serve.engine.stream import ChunkStream, collect
from llava_serve.errors import LlavaServeError
from llava_serve.images.fetch import ImageSource
from llava_serve.openai_messages import ChatMessage, as_message
from llava_serve.processor import Processor
from llava_serve.types import Chunk, GenerationResult, Message, PreparedPrompt, SamplingParams


class LLM:
    """A model and its engine, driven in a loop until the answers are there. Not for several threads.

    Args:
        model: `builtin`, a folder, or a hub id in the local cache.
        model_base, vision_tower, conv_mode, device, dtype, quantization: see `ModelOptions`.
        engine, images: limits; None takes the defaults.

    Raises:
        CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "builtin",
        *,
        model_base: str | None = None,
        vision_tower: str | None = None,
        conv_mode: str | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        quantization: Literal["8bit", "4bit"] | None = None,
        engine: EngineOptions | None = None,
        images: ImageOptions | None = None,
    ) -> None:
        options = ModelOptions(
            model=model,
            model_base=model_base,
            vision_tower=vision_tower,
            conv_mode=conv_mode,
            device=device,
            dtype=dtype,
            quantization=quantization,
        )
        self.engine: Engine = build_engine(options, engine or EngineOptions())
        self.spec: CheckpointSpec = self.engine.model.spec
        self.processor = Processor(self.spec, images or ImageOptions())
        self._answers: dict[str, _Answer] = {}

    @overload
    def generate(
        self,
        prompts: str,
        images: Sequence[ImageSource] | None = None,
        sampling: SamplingParams | None = None,
        conv_mode: str | None = None,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: list[str],
        images: Sequence[Sequence[ImageSource]] | None = None,
        sampling: SamplingParams | None = None,
        conv_mode: str | None = None,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Any] | None = None,
        sampling: SamplingParams | None = None,
        conv_mode: str | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Answers one query, or a list of them batched by the engine.

        Args:
            prompts: `<image-placeholder>` marks where an image goes; without it, each image stands before the text.
            images: a flat list for one query; a list of lists for a list of queries.

        Raises:
            RequestError: an input is not acceptable; nothing has been generated.
        """
        if isinstance(prompts, str):
            return self.run([self.processor.prepare_query(prompts, images or (), conv_mode=conv_mode)], sampling)[0]
        each = images if images is not None else [()] * len(prompts)
        prepared = [
            self.processor.prepare_query(prompt, pictures, conv_mode=conv_mode)
            for prompt, pictures in zip(prompts, each, strict=True)
        ]
        return self.run(prepared, sampling)

    @overload
    def chat(
        self, messages: Sequence[ChatMessage], sampling: SamplingParams | None = None, conv_mode: str | None = None
    ) -> GenerationResult: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[ChatMessage]],
        sampling: SamplingParams | None = None,
        conv_mode: str | None = None,
    ) -> list[GenerationResult]: ...

    def chat(
        self,
        messages: Sequence[Any],
        sampling: SamplingParams | None = None,
        conv_mode: str | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Answers a conversation, or a list of them batched by the engine.

        Raises:
            RequestError: a message is not acceptable; nothing has been generated.
        """
        single = not messages or isinstance(messages[0], Message | Mapping)
        conversations = [messages] if single else messages
        prepared = [
            self.processor.prepare(
                [as_message(message, self.processor.options) for message in conversation], conv_mode=conv_mode
            )
            for conversation in conversations
        ]
        results = self.run(prepared, sampling)
        return results[0] if single else results

    def stream(self, prepared: PreparedPrompt, sampling: SamplingParams | None = None) -> Iterator[Chunk]:
        """Answers a prepared prompt chunk by chunk; several streams may be open. Closing the iterator ends the work.

        Raises:
            NumericalError: the model's numbers did not stay finite.
        """
        request = self.engine.limits.accept(uuid.uuid4().hex, prepared, sampling or SamplingParams())
        answer = self._open(request)
        try:
            while not answer.done or answer.chunks:
                if not answer.chunks:
                    self._step()
                yield from answer.take()
            answer.check()
        finally:
            self._close(request)

    def run(self, prepared: Iterable[PreparedPrompt], sampling: SamplingParams | None = None) -> list[GenerationResult]:
        """Answers prepared prompts, batched by the engine, in their order.

        Raises:
            NumericalError: the model's numbers did not stay finite for one of them; the others have been answered.
        """
        sampling = sampling or SamplingParams()
        requests = [self.engine.limits.accept(uuid.uuid4().hex, prompt, sampling) for prompt in prepared]
        answers: list[_Answer] = []
        try:
            while len(answers) < len(requests) or not all(answer.done for answer in answers):
                while len(answers) < len(requests) and self.engine.has_room(requests[len(answers)]):
                    answers.append(self._open(requests[len(answers)]))
                self._step()
        finally:
            for request in requests:
                self._close(request)
        for answer in answers:
            answer.check()
        return [collect(request.prompt, answer.take()) for request, answer in zip(requests, answers, strict=True)]

    def _open(self, request: EngineRequest) -> _Answer:
        self.engine.add(request)
        answer = _Answer(ChunkStream(self.processor.tokenizer, request))
        self._answers[request.request_id] = answer
        return answer

    def _close(self, request: EngineRequest) -> None:
        self.engine.abort(request.request_id)
        self._answers.pop(request.request_id, None)

    def _step(self) -> None:
        """One step of the engine: new chunks go to whom they belong."""
        for output in self.engine.step():
            answer = self._answers[output.request_id]
            try:
                chunk = None if answer.error else answer.stream.push(output)
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
    """What has come of an answer and has not been taken yet; `error`: why nothing more does."""

    stream: ChunkStream
    chunks: list[Chunk] = field(default_factory=list)
    error: LlavaServeError | None = None

    @property
    def done(self) -> bool:
        """Nothing more comes."""
        return self.stream.done or self.error is not None

    def take(self) -> list[Chunk]:
        taken = list(self.chunks)
        self.chunks.clear()
        return taken

    def check(self) -> None:
        """Raises the error, if there is one."""
        if self.error is not None:
            raise self.error
