"""LLM: answers many prompts offline, batched by one engine, in the caller's thread."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Unpack, get_args, overload

from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.config import (
    EngineOptions,
    ImageOptions,
    ModelKeywords,
    ModelOptions,
    resolve_image_options,
    resolve_model_options,
)
from llava_serve.deadline import check_deadline
from llava_serve.engine.answers import OpenAnswers
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.build import build_engine
from llava_serve.errors import LlavaServeError, RequestError
from llava_serve.inputs import (
    CallOptions,
    Errors,
    Images,
    Prompt,
    as_images,
    checked_queries,
    checked_sampling,
    deadline_of,
    images_and_sampling,
    images_of_each,
    is_one_conversation,
    sampling_of_each,
)
from llava_serve.openai_messages import ChatMessage
from llava_serve.options import resolve_options
from llava_serve.processor import Processor
from llava_serve.prompt_runner import PromptRunner, as_result
from llava_serve.results import GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, PreparedPrompt


class LLM:
    """A model and its engine, stepped in the caller's thread until the answers are complete. Not thread-safe.

    Args:
        model: `builtin`, a folder, or a hub id in the local cache; or all options of a model.
        engine: limits; None takes the defaults. `auto` compiles nothing here: most scripts end before it pays.
        image_options: which images are accepted; None takes the defaults.
        images: the deprecated name of `image_options`.
        keywords: the other fields of `ModelOptions`.

    Raises:
        CheckpointError: the model cannot be loaded.
        RequestError: an option of the model has a wrong value.
    """

    def __init__(
        self,
        model: str | Path | ModelOptions = "builtin",
        *,
        engine: EngineOptions | None = None,
        image_options: ImageOptions | None = None,
        images: ImageOptions | None = None,
        **keywords: Unpack[ModelKeywords],
    ) -> None:
        options = resolve_options(EngineOptions, engine, "engine")
        self.engine: Engine = build_engine(resolve_model_options(model, **keywords), options)
        self.spec: CheckpointSpec = self.engine.model.spec
        self.processor = Processor(self.spec, resolve_image_options(image_options, images))
        self._answers = OpenAnswers(self.engine, self.processor.tokenizer)
        self._runner = PromptRunner(self.engine, self.processor, self._answers, 2 * options.max_num_seqs)

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
        *,
        errors: Literal["raise"] = "raise",
        **options: Unpack[CallOptions],
    ) -> list[GenerationResult]: ...

    @overload
    def generate(
        self,
        query: list[str] | tuple[str, ...],
        images: Sequence[Images] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: Literal["return"],
        **options: Unpack[CallOptions],
    ) -> list[GenerationResult | LlavaServeError]: ...

    def generate(
        self,
        query: str | Sequence[str],
        images: Any = None,
        sampling: Any = None,
        *,
        errors: Errors = "raise",
        **options: Unpack[CallOptions],
    ) -> GenerationResult | list[GenerationResult] | list[GenerationResult | LlavaServeError]:
        """Answers one query, or a list of them batched by the engine.

        Args:
            query: `<image-placeholder>` marks where an image goes; without it, each image stands before the text.
            images: for one query an image, a list of them, or None; for a list of queries one such entry each.
            sampling: for a list of queries one for all, or one each.
            errors: of a list: `raise` the first error, which ends the call; or `return` each in the place of its
                answer. The error's `index` is that in the list.
            options: `conv_mode`, `timeout` in seconds and `priority`.

        Raises:
            RequestError: an input is not valid. In a list it is found when its turn comes.
            DeadlineExceededError: the deadline passed before all answers were complete.
        """
        if isinstance(query, str):
            return self._answer_one(query, as_images(images), sampling, errors, options)
        queries = checked_queries(query)
        return self._answer_all(queries, images_of_each(images, len(queries)), sampling, errors, options)

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
        *,
        errors: Literal["raise"] = "raise",
        **options: Unpack[CallOptions],
    ) -> list[GenerationResult]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[ChatMessage]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: Literal["return"],
        **options: Unpack[CallOptions],
    ) -> list[GenerationResult | LlavaServeError]: ...

    def chat(
        self,
        messages: Sequence[Any],
        sampling: Any = None,
        *,
        errors: Errors = "raise",
        **options: Unpack[CallOptions],
    ) -> GenerationResult | list[GenerationResult] | list[GenerationResult | LlavaServeError]:
        """Answers a conversation, or a list of them batched by the engine.

        Args:
            messages: OpenAI's form, or `Message`s.
            sampling: for a list of conversations one for all, or one each.
            errors, options: as `generate`.

        Raises:
            RequestError: a message is not valid. In a list it is found when its turn comes.
            DeadlineExceededError: as `generate`.
        """
        if is_one_conversation(messages):
            return self._answer_one(messages, (), sampling, errors, options)
        return self._answer_all(messages, [()] * len(messages), sampling, errors, options)

    def generate_iter(self, prompts: Iterable[Prompt]) -> Generator[tuple[int, GenerationResult | LlavaServeError]]:
        """Answers prompts as they come, batched by the engine, and gives each with its number as it is finished.

        Prompts are taken and prepared as the engine has room, twice `max_num_seqs` at most at once: there may be any
        number of them. What fails for one of them is its result. Closing the iterator ends the work.
        """
        with closing(self._runner.run(prompts, deadline=None)) as finished:
            for index, outcome in finished:
                yield index, as_result(index, outcome)

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
        deadline = deadline_of(options)
        read = self.processor.read(asked, images)
        prepared = self.processor.prepare(
            read, conv_mode=options.get("conv_mode"), check=lambda: check_deadline(deadline)
        )
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
        answer = self._answers.open(self._runner.accept(prepared, sampling, deadline, priority))
        try:
            while not answer.ended or answer.has_output:
                while not answer.has_output:
                    self._answers.step()
                yield from answer.take()
        finally:
            self._answers.close(answer)

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
        samplings = sampling_of_each(sampling, len(prompts))
        each = [Prompt(prompt, sampling=one, priority=priority) for prompt, one in zip(prompts, samplings, strict=True)]
        return self._in_order(each, deadline, "raise")

    def _answer_one(
        self, asked: Any, images: Sequence[Any], sampling: SamplingParams | None, errors: Errors, options: CallOptions
    ) -> GenerationResult:
        if errors != "raise":
            raise RequestError("errors is for a list of prompts; the error of a single one is raised.", "errors")
        [(_, result)] = self._runner.run([_prompt(asked, images, sampling, options)], deadline_of(options))
        if isinstance(result, Exception):
            raise result
        return result

    def _answer_all(
        self, asked: Sequence[Any], images: Sequence[Sequence[Any]], sampling: Any, errors: Errors, options: CallOptions
    ) -> list[Any]:
        """Answers queries with their images, or conversations, in their order."""
        if errors not in get_args(Errors):
            raise RequestError("errors must be 'raise' or 'return'.", "errors")
        each = zip(asked, images, sampling_of_each(sampling, len(asked)), strict=True)
        return self._in_order([_prompt(*one, options) for one in each], deadline_of(options), errors)

    def _in_order(self, prompts: Sequence[Prompt], deadline: float | None, errors: Errors) -> list[Any]:
        results: list[Any] = [None] * len(prompts)
        with closing(self._runner.run(prompts, deadline)) as finished:
            for index, result in finished:
                if isinstance(result, LlavaServeError):
                    result = result.of_prompt(index)
                if isinstance(result, Exception) and errors == "raise":
                    raise result
                results[index] = as_result(index, result)
        return results


def _prompt(asked: Any, images: Any, sampling: SamplingParams | None, options: CallOptions) -> Prompt:
    """A prompt of a call, whose timeout is that of the whole call."""
    conv_mode, priority = options.get("conv_mode"), options.get("priority", 0)
    return Prompt(asked, images, checked_sampling(sampling), conv_mode, priority=priority)
