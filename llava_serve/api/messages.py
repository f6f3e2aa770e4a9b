"""From bytes to what the library works on: a checked request, its messages, its sampling."""

from __future__ import annotations

from pydantic import ValidationError

from llava_serve.api.extras import refuse_extras
from llava_serve.api.schema import ChatRequest, Part, WireMessage
from llava_serve.api.sentences import sentence
from llava_serve.errors import RequestError, UnsupportedParameterError
from llava_serve.types import ImagePart, Message, Role, SamplingParams, TextPart

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


def parse_request(body: bytes) -> ChatRequest:
    """Reads a request.

    Raises:
        RequestError: it is not JSON, or a field is missing or wrong; the sentence names the field.
        UnsupportedParameterError: a field asks for what this server does not do.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        message, param = sentence(error)
        raise RequestError(message, param) from None
    refuse_extras(request)
    return request


def messages_of(request: ChatRequest) -> tuple[Message, ...]:
    """The conversation in the library's form. Sources of pictures pass through as they are."""
    return tuple(_message(message, f"messages[{number}]") for number, message in enumerate(request.messages))


def sampling_of(request: ChatRequest) -> SamplingParams:
    """How the answer is drawn: what the request says, and the library's defaults for the rest.

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


def _message(message: WireMessage, path: str) -> Message:
    role: Role = "system" if message.role == "developer" else message.role
    parts = tuple(_part(part, f"{path}.content[{number}]") for number, part in enumerate(message.content))
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        raise UnsupportedParameterError(f"A picture can stand in a user message only, not in {path}.", path)
    return Message(role, parts)


def _part(part: Part, path: str) -> TextPart | ImagePart:
    if part.type == "text" and part.text is not None and part.image_url is None:
        return TextPart(part.text)
    if part.type == "image_url" and part.image_url is not None and part.text is None:
        return ImagePart(part.image_url.url)
    raise RequestError(f"{path} must hold '{part.type}', as its type says, and nothing else.", path)
