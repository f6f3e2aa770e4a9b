"""From bytes to a validated request and its sampling parameters."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from llava_serve.api.middleware import is_request_id
from llava_serve.api.protocol import ChatRequest, GenerationFields
from llava_serve.api.structured import GUIDED, structured_output
from llava_serve.errors import RequestError, UnsupportedParameterError
from llava_serve.faults import as_request_error
from llava_serve.openai_messages import from_wire
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Conversation, ImageOrder, Message
from llava_serve.wire import Wire, refuse_extras, unsupported_fields

Request = TypeVar("Request", bound=Wire)


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
    "min_p",
    "min_tokens",
    "include_stop_str_in_output",
)


MAX_VALUES = 100_000
"""JSON values of a body, counted by its commas and brackets, those in texts too. Parsing takes time and some hundred
bytes of memory for each, and a conversation of a hundred thousand tokens has fewer."""

_TO_THE_END = 1 << 31
"""More tokens than a context has; the engine cuts it to what the context holds."""
_TOKEN_ID = re.compile("[0-9]{1,9}", re.ASCII)
_STRUCTURE = (b",", b"[", b"{")


@dataclass(frozen=True, slots=True)
class ParsedChat:
    """A request that was read, in values that are quick to pass from one process to another.

    Attributes:
        wire: its fields, without the messages and without fields that are not declared.
        conversation: its messages.
        notes: on what stands elsewhere in the conversation than it was sent.
        ignored: fields that are not supported.
    """

    wire: ChatRequest
    conversation: Sequence[Message]
    notes: tuple[str, ...]
    ignored: tuple[str, ...]


def read_chat(body: bytes, *, ignore_unknown: bool, image_order: ImageOrder) -> ParsedChat:
    """Does all work on a request that grows with its body. Arguments and errors are those of `parse_request` and
    `conversation_of`."""
    wire = parse_request(body, ChatRequest, ignore_unknown=ignore_unknown)
    conversation, notes = conversation_of(wire, image_order)
    declared = wire.model_fields_set & ChatRequest.model_fields.keys() - {"messages"}
    bare = ChatRequest.model_construct(**{name: getattr(wire, name) for name in declared})
    return ParsedChat(bare, conversation, notes, tuple(unsupported_fields(wire)) if ignore_unknown else ())


def parse_request(body: bytes, kind: type[Request], *, ignore_unknown: bool = False) -> Request:
    """Parses a request. The work is linear in the body's length, and the first fault ends it.

    Args:
        kind: of the request.
        ignore_unknown: accept fields that ask for something that this server does not support; `unsupported_fields`
            lists them.

    Raises:
        RequestError: it is not JSON, or a field is missing or wrong; the sentence names the field.
        UnsupportedParameterError: a field asks for something that this server does not support.
    """
    if sum(map(body.count, _STRUCTURE)) > MAX_VALUES:
        raise RequestError(f"The request's body has more than {MAX_VALUES:,} values.")
    try:
        request = kind.model_validate_json(body.removeprefix(BOM_UTF8))
    except ValidationError as error:
        raise as_request_error(error) from None
    check_tools(request)
    if not ignore_unknown:
        refuse_extras(request)
    for name in ("response_format", "structured_outputs"):  # an answer of another form is of no use
        if (form := getattr(request, name, None)) is not None:
            refuse_extras(form, f"{name}.")
    return request


def check_tools(request: Wire) -> None:
    """Refuses to call tools. A list of tools that are not to be called passes.

    Raises:
        UnsupportedParameterError: a tool may or must be called.
    """
    fields = request.model_extra or {}
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        must = fields.get(choice) not in (None, "", "none", "auto")
        if must or (fields.get(tools) and fields.get(choice) != "none"):
            name = choice if must else tools
            raise UnsupportedParameterError(
                f"This server calls no tools, so '{name}' is not supported as given: leave it out, or send "
                f"'{choice}': 'none'. For an answer of a given form, describe the form in 'response_format'.",
                name,
            )


def sampling_of(request: GenerationFields, default_max_tokens: int | None = None) -> SamplingParams:
    """The sampling parameters: the request's, and the library's defaults for the rest.

    Args:
        default_max_tokens: the longest answer where the request sets none; None is to the end of the context.

    Raises:
        RequestError: two fields contradict each other, or a value is outside its range.
    """
    if len({request.max_tokens, request.max_completion_tokens} - {None}) > 1:
        raise RequestError("Give max_tokens or max_completion_tokens, not both.", "max_completion_tokens")
    if request.stream_options is not None and request.stream_options.include_usage and not request.stream:
        raise RequestError("stream_options needs stream to be true.", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError("prompt_logprobs does not go with a stream: leave one of them out.", "prompt_logprobs")
    lengths = (request.max_completion_tokens, request.max_tokens, default_max_tokens, _TO_THE_END)
    given = {
        **{name: getattr(request, name) for name in _SAME_NAME},
        "max_new_tokens": next(length for length in lengths if length is not None),
        "stop": tuple(request.stop or ()),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "logit_bias": _bias(request.logit_bias or {}),
        "logprobs": request.alternatives,
        "prompt_logprobs": request.prompt_alternatives,
        "structured": structured_output(
            request.response_format,
            request.structured_outputs,
            {kind: getattr(request, f"guided_{kind}") for kind in GUIDED},
        ),
    }
    if request.top_p == 0:
        given |= {"top_p": None, "temperature": 0.0}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    if not all(_TOKEN_ID.fullmatch(token) for token in given):
        raise RequestError("The keys of logit_bias must be token ids.", "logit_bias")
    return {int(token): value for token, value in given.items()}


def conversation_of(
    request: ChatRequest, image_order: ImageOrder, field: str = "messages", first: int = 0
) -> tuple[Sequence[Message], tuple[str, ...]]:
    """The conversation of a request, and notes on what stands elsewhere than it was sent.

    Args:
        field, first: where it stands in the request, for errors, and the place of its first message there.

    Raises:
        RequestError: a message cannot be used.
    """
    messages, notes = from_wire(request.messages, field, first)
    conversation = Conversation(messages, request.continue_final_message, request.add_generation_prompt, image_order)
    # One with the defaults goes as plain messages, which picture replicas of older releases take, too.
    return messages if conversation == Conversation(messages) else conversation, notes


def completion_id(request: GenerationFields, prefix: str, default: str) -> str:
    """The id of a completion: a prefix, and the request's own id, as in vLLM, or the default.

    Raises:
        RequestError: it is no short word.
    """
    if request.request_id is None:
        return f"{prefix}{default}"
    if not is_request_id(request.request_id):
        raise RequestError(
            "request_id must be 1 to 128 letters, digits and marks out of _ . : / + = @ -.", "request_id"
        )
    return f"{prefix}{request.request_id}"


def check_priority(priority: int, allowed: tuple[int, int]) -> None:
    """Raises `RequestError` for a priority outside the range for clients."""
    smallest, largest = allowed
    if not smallest <= priority <= largest:
        raise RequestError(f"priority must be between {smallest} and {largest} on this server.", "priority")
