"""The arguments of `generate`, `chat` and `stream` in one form: a list of prompts, each with its images and
its sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

from llava_serve.deadline import deadline_in
from llava_serve.errors import RequestError, shown
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


def deadline_of(options: CallOptions) -> float | None:
    """The deadline of a call with these options, which it checks.

    Raises:
        TypeError: there is no such option: what a typo says would be ignored.
        RequestError: a value of another type.
    """
    for name in options:
        if name not in CallOptions.__annotations__:
            raise TypeError(f"There is no option {name!r}; there are {', '.join(CallOptions.__annotations__)}.")
    timeout, priority = options.get("timeout"), options.get("priority", 0)
    if not isinstance(timeout, Real | None):
        raise RequestError(f"timeout must be a number of seconds; got {shown(timeout)}.", "timeout")
    if not isinstance(priority, Integral):
        raise RequestError(f"priority must be a whole number; got {shown(priority)}.", "priority")
    return deadline_in(timeout)


def checked_sampling(sampling: SamplingParams | None) -> SamplingParams | None:
    """The sampling parameters of one prompt.

    Raises:
        RequestError: they are no `SamplingParams`.
    """
    if not isinstance(sampling, SamplingParams | None):
        raise RequestError(
            f"sampling must be a SamplingParams, and for a list of prompts may be a list of them; got a "
            f"{type(sampling).__name__}.",
            "sampling",
        )
    return sampling


def checked_queries(queries: Any) -> Sequence[str]:
    """A list of queries.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(queries, list | tuple) or not all(isinstance(query, str) for query in queries):
        raise RequestError("query must be a text or a list of texts; messages go to chat.", "query")
    return queries


def checked_query(query: Any) -> str:
    """One query, where a call takes no list.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(query, str):
        raise RequestError("query must be a text; several are asked for by a call each.", "query")
    return query


def as_images(images: Any) -> list[Any]:
    """The images of one prompt: one picture, a list of them, or None."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def images_and_sampling(images: Any, sampling: SamplingParams | None) -> tuple[list[Any], SamplingParams | None]:
    """The images and the sampling of one prompt. In `stream(messages, sampling)`, as in `chat`, the second argument is
    the sampling."""
    return ([], images) if isinstance(images, SamplingParams) else (as_images(images), checked_sampling(sampling))


def images_of_each(images: Any, count: int) -> list[list[Any]]:
    """The images of each of `count` prompts: one entry each, a picture, a list of them, or None.

    Raises:
        RequestError: not one entry each.
    """
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, list | tuple) or len(images) != count:
        given = f"a list of {len(images)}" if isinstance(images, list | tuple) else "one picture"
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


def checked_messages(messages: Any) -> Sequence[Any]:
    """Messages, or conversations.

    Raises:
        RequestError: it is a text, or has one.
    """
    if not isinstance(messages, Sequence) or any(isinstance(each, str) for each in (messages, *messages)):
        raise RequestError("messages must be a list of messages; a text alone goes to generate.", "messages")
    return messages


def is_one_conversation(messages: Sequence[Any]) -> bool:
    """Whether it is a conversation, rather than a list of conversations.

    Raises:
        RequestError: as `checked_messages`.
    """
    return not checked_messages(messages) or isinstance(messages[0], Message | Mapping)
