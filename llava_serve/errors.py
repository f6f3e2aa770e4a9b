"""Every error that a caller can get.

LlavaServeError
├── RequestError               the caller's fault (also a ValueError)
│   ├── InvalidImageError      not an image, too large, too many, unreachable, refused address
│   ├── PromptTooLongError     says got and limit
│   ├── UnsupportedParameterError
│   ├── BodyTooLargeError
│   ├── UnsupportedMediaTypeError
│   └── UnknownModelError
├── AccessError                the API key is missing or invalid
├── CapacityError              at capacity: try again later
│   ├── RateLimitError         the client is beyond a limit of its API key
│   ├── DrainingError          the server is shutting down: another one may answer
│   └── ModelStartingError     another model is being replaced by this one
├── DeadlineExceededError      the request's time was up (also a TimeoutError)
├── CheckpointError            at load only: names file and tensor
├── NumericalError             the model's numbers overflowed on this request; names the dtype to try
└── EngineDeadError            the engine's loop has ended

A class carries no HTTP status: the web app has one table (`llava_serve.api.errors`). The message is a sentence for the
caller: no path of the server, no library's text, no traceback. Every class can be pickled, since Ray transports errors.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

SHOWN = 100
"""Characters of a caller's value that a message repeats."""


def shown(value: object) -> str:
    """A caller's value as a message repeats it: its beginning."""
    return str(value)[:SHOWN]


def reason(error: BaseException) -> str:
    """What a library says of a checkpoint, in one line: its beginning. For who starts a model, never for a caller."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[: 2 * SHOWN]}"


class LlavaServeError(Exception):
    """Root of the tree.

    Args:
        message: one sentence for the caller.
        param: the request field at fault, where there is one (OpenAI's `error.param`).

    Attributes:
        index: of the prompt that failed, in the list of the library's call, from 0; None outside of lists.
    """

    index: int | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message if self.index is None else f"Prompt {self.index}: {self.message}"

    def of_prompt(self, index: int) -> Self:
        """The same for one prompt of a list. A copy: several prompts can fail by one error."""
        named = copy.copy(self)
        named.index = index
        named.__cause__ = self.__cause__
        return named


class RequestError(LlavaServeError, ValueError):
    """The request cannot be served as it stands."""


class InvalidImageError(RequestError):
    """A picture is not readable, not allowed, or too large."""


class PromptTooLongError(RequestError):
    """The prompt does not fit the model's context. Clients know the sentence by "maximum context length is N tokens".

    Args:
        got: positions that the prompt takes.
        limit: the most positions of a prompt: one less than the context has.
        at_least: the prompt takes `got` or more.
    """

    def __init__(self, got: int, limit: int, at_least: bool = False) -> None:
        takes = f"at least {got}" if at_least else got
        super().__init__(
            f"This model's maximum context length is {limit + 1} tokens, and the answer needs one of them; "
            f"the prompt takes {takes}.",
            "messages",
        )
        self.args = (got, limit, at_least)  # what unpickling passes to __init__
        self.got = got
        self.limit = limit


class UnsupportedParameterError(RequestError):
    """A field asks for something that this server does not support."""


class BodyTooLargeError(RequestError):
    """The request body is over the server's limit."""


class UnsupportedMediaTypeError(RequestError):
    """The request's body is not sent as JSON."""


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


class AccessError(LlavaServeError):
    """The API key of the request is missing or invalid."""


class CapacityError(LlavaServeError):
    """The server is at capacity; the same request may succeed later.

    Args:
        retry_after_s: seconds after which to try again.
        reason: of the refusal, one word for metrics and logs.
    """

    def __init__(self, message: str, retry_after_s: int = 1, reason: str = "in_flight") -> None:
        super().__init__(message)
        self.args = (message, retry_after_s, reason)
        self.retry_after_s = retry_after_s
        self.reason = reason


class RateLimitError(CapacityError):
    """The client has used up what its API key may have at once, or in a minute."""


class DrainingError(CapacityError):
    """The server finishes the requests in flight, and takes no more."""


class ModelStartingError(CapacityError):
    """The model that the request is for has no replica yet, or no more."""


class DeadlineExceededError(LlavaServeError, TimeoutError):
    """The request's time was up before its answer was complete."""


class CheckpointError(LlavaServeError):
    """A checkpoint cannot be loaded; the message names the file or tensor and what to do. Raised at load only."""


class NumericalError(LlavaServeError):
    """The model's numbers became NaN or infinity on this request; the message names what the operator can change."""


class EngineDeadError(LlavaServeError):
    """The engine's loop has ended; the replica is to be replaced."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a value: the result, or the last item, of a call between Ray deployments that failed.

    It stands here, since every Ray job that calls the application has the library, and not every one its deployments.
    """

    error: LlavaServeError
