"""From bytes to a validated request and its sampling parameters."""

from __future__ import annotations

from pydantic import ValidationError

from llava_serve.api.protocol import ChatRequest
from llava_serve.errors import RequestError
from llava_serve.types import SamplingParams
from llava_serve.wire import as_request_error, refuse_extras

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "n",
    "num_beams",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)


MAX_VALUES = 100_000
"""JSON values of a body, counted by its commas and brackets, those in texts too. Parsing takes time and some hundred
bytes of memory for each, and a conversation of a hundred thousand tokens has fewer."""

_STRUCTURE = (b",", b"[", b"{")


def parse_request(body: bytes) -> ChatRequest:
    """Parses a request. The work is linear in the body's length, and the first fault ends it.

    Raises:
        RequestError: it is not JSON, or a field is missing or wrong; the sentence names the field.
        UnsupportedParameterError: a field asks for something that this server does not support.
    """
    if sum(map(body.count, _STRUCTURE)) > MAX_VALUES:
        raise RequestError(f"The request's body has more than {MAX_VALUES:,} values.")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise as_request_error(error) from None
    refuse_extras(request)
    return request


def sampling_of(request: ChatRequest) -> SamplingParams:
    """The sampling parameters: the request's, and the library's defaults for the rest.

    Raises:
        RequestError: two fields contradict each other, or a value is outside its range.
    """
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError("Give max_tokens or max_completion_tokens, not both.", "max_completion_tokens")
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    if request.stream_options is not None and request.stream_options.include_usage and not request.stream:
        raise RequestError("stream_options needs stream to be true.", "stream_options")
    given = {
        **{name: getattr(request, name) for name in _SAME_NAME},
        "max_new_tokens": request.max_completion_tokens or request.max_tokens,
        "stop": tuple(request.stop) if request.stop is not None else None,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def check_priority(priority: int, allowed: tuple[int, int]) -> None:
    """Raises `RequestError` for a priority outside the range for clients."""
    smallest, largest = allowed
    if not smallest <= priority <= largest:
        raise RequestError(f"priority must be between {smallest} and {largest} on this server.", "priority")
