"""The arguments of `generate`, `chat` and `stream` in one form: a list of prompts, each with its images and
its sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from llava_serve.errors import RequestError
from llava_serve.images.fetch import ImageSource
from llava_serve.openai_messages import ChatMessage
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Asked, Message, PreparedPrompt

Images = ImageSource | Sequence[ImageSource] | None
"""The images of one prompt: one, several, or none."""

Errors = Literal["raise", "return"]
"""What a prompt of a list that fails does: it ends the call, or its error stands in the place of its answer."""


class CallOptions(TypedDict, total=False):
    """The options of every call.

    Attributes:
        conv_mode: overrides the checkpoint's template.
        timeout: seconds that the answer may take; then `DeadlineExceededError`.
        priority: a smaller number is served earlier, as in vLLM; 0 by default.
    """

    conv_mode: str | None
    timeout: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One of many prompts, with what is its own.

    Attributes:
        asked: a query, messages in OpenAI's form, a prompt that was prepared, or what returns a query or messages with
            the images read in it. That is called in another thread, when its turn comes.
        images: of a query, as in `LLM.generate`.
        sampling: None takes the defaults.
        conv_mode: overrides the checkpoint's template.
        timeout: seconds that the answer may take from the prompt's turn.
        priority: a smaller number is served earlier.
    """

    asked: str | Sequence[ChatMessage] | PreparedPrompt | Callable[[], Asked]
    images: Images = None
    sampling: SamplingParams | None = None
    conv_mode: str | None = None
    timeout: float | None = None
    priority: int = 0


def as_images(images: Any) -> list[Any]:
    """The images of one prompt: one picture, a list of them, or None."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def images_and_sampling(images: Any, sampling: SamplingParams | None) -> tuple[list[Any], SamplingParams | None]:
    """The images and the sampling of one prompt. In `stream(messages, sampling)`, as in `chat`, the second argument is
    the sampling."""
    return ([], images) if isinstance(images, SamplingParams) else (as_images(images), sampling)


def images_of_each(images: Any, count: int) -> list[list[Any]]:
    """The images of each of `count` prompts: one entry each, a picture, a list of them, or None.

    Raises:
        RequestError: not one entry each.
    """
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, list | tuple) or len(images) != count:
        given = f"{len(images)} entries" if isinstance(images, list | tuple) else "one picture"
        raise RequestError(
            f"For a list of {count} prompts, images has one entry each (a picture, a list of pictures, or None); "
            f"got {given}.",
            "images",
        )
    return [as_images(each) for each in images]


def sampling_of_each(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """The sampling parameters of each of `count` answers: one for all, or one each.

    Raises:
        RequestError: not one each.
    """
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if len(sampling) != count:
        raise RequestError(
            f"sampling is one SamplingParams for all prompts or a list with one each; got {len(sampling)} for {count}.",
            "sampling",
        )
    return list(sampling)


def is_one_conversation(messages: Sequence[Any]) -> bool:
    """Whether it is a conversation, rather than a list of conversations."""
    return not messages or isinstance(messages[0], Message | Mapping)
