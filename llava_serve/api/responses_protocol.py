"""The wire format of `POST /v1/responses`: OpenAI's Responses API without state and tools."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from llava_serve.api.field_types import Integer, Limit
from llava_serve.api.neutral import NEUTRAL_FIELDS
from llava_serve.api.protocol import Answer, ChatRequest, StreamOptions, TokenLogprobs
from llava_serve.api.structured import JsonSchema, ResponseFormat
from llava_serve.errors import RequestError, UnsupportedParameterError, shown
from llava_serve.faults import as_request_error
from llava_serve.openai_messages import MAX_MESSAGES, WireMessage
from llava_serve.types import FinishReason
from llava_serve.wire import Wire, anything, one_of

LOGPROBS = "message.output_text.logprobs"
"""What `include` asks for."""
_TURN = re.compile(r"messages\[(?P<number>\d+)\](?P<rest>.*)")


class InputItem(WireMessage):
    """One turn; answers of earlier responses may be sent as they were received."""

    NEUTRAL = WireMessage.NEUTRAL | {"status": anything, "phase": anything}

    type: Literal["message"] | None = None


_LABELS = ("type", "id", "call_id", "status")
"""Of a call and its output; the model does not see them."""


def _as_items(given: Any) -> Any:
    """The turns of an input: a text is the user's, and calls of tools are those of a chat's history."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError("must be a text or a list of turns")
    return list(map(_as_turn, given))


def _as_turn(item: Any) -> Any:
    if not isinstance(item, dict) or item.get("type") in (None, "message"):
        return item
    rest = {name: value for name, value in item.items() if name not in _LABELS}
    if item["type"] == "function_call":
        call = {name: rest.pop(name) for name in ("name", "arguments") if name in rest}
        return {"role": "assistant", "tool_calls": [{"function": call}], **rest}
    if item["type"] == "function_call_output":
        return {"role": "tool", "content": rest.pop("output", None), **rest}
    raise ValueError(
        f"has an item of the type {shown(item['type'])!r}, which this server does not take: it takes turns "
        "(message), function_call and function_call_output"
    )


class TextFormat(JsonSchema):
    """The form of the answer's text: OpenAI's `response_format`, with the schema in the same object."""

    type: Literal["text", "json_object", "json_schema"]

    def as_response_format(self) -> ResponseFormat:
        """The same as a chat completion has it.

        Raises:
            RequestError: the schema does not go with the type, or is missing.
        """
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestError("text.format has a schema with the type json_schema, and only then.", "text.format")
        schema = {"json_schema": self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)}
        return ResponseFormat.model_validate({"type": self.type} | (schema if self.json_schema is not None else {}))


class TextOptions(Wire):
    """Of the answer's text."""

    NEUTRAL = {"verbosity": one_of("medium")}  # noqa: RUF012 (a ClassVar of the base)

    format: TextFormat | None = None


_CHAT_FIELDS = (
    *("model", "temperature", "top_p", "top_k", "seed", "stream", "user"),
    *("conv_mode", "timeout", "priority", "cache_salt"),
)


class ResponseRequest(Wire):
    """A request of the Responses API. Fields with the name of one of a chat completion mean the same.

    Attributes:
        input: a text, or turns with `input_text`, `input_image` and `output_text`, oldest first. A `function_call` and
            its `function_call_output` are shown to the model as text.
        instructions: the system message.
        max_output_tokens: the longest answer in tokens.
        text: the form of the answer's text.
        include: `message.output_text.logprobs` asks for the log-probability of each token.
        top_logprobs: return the log-probabilities of this many alternatives, too.
        previous_response_id, conversation, store: state, which this server does not keep.
    """

    NEUTRAL = {  # noqa: RUF012 (a ClassVar of the base)
        **NEUTRAL_FIELDS,
        "max_tool_calls": anything,
        "reasoning": one_of({}, {"effort": "none"}),
        "truncation": one_of("disabled"),
    }

    model: str | None = None
    input: Annotated[
        Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)],
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    max_output_tokens: Limit = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    seed: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    conv_mode: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    store: bool | None = None

    def field_name(self, param: str | None) -> str | None:
        """As `Wire` says. The instructions are a chat's first message."""
        if turn := _TURN.fullmatch(param or ""):
            number = int(turn["number"]) - bool(self.instructions)
            return f"input[{number}]{turn['rest']}" if number >= 0 else "instructions"
        return {"messages": "input", "response_format": "text.format"}.get(param or "", param)

    def as_chat(self) -> ChatRequest:
        """The same as a chat completion request: one of `messages` and `max_tokens`.

        Raises:
            RequestError: a field is wrong.
            UnsupportedParameterError: the request needs state.
        """
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name):
                raise UnsupportedParameterError(
                    f"This server keeps no responses, so '{name}' is not supported: send the earlier turns in 'input'.",
                    name,
                )
        if self.store:
            raise UnsupportedParameterError(
                "This server keeps no responses: leave 'store' out, or send false, and send earlier turns in 'input'.",
                "store",
            )
        included = set(self.include or ()) - {"reasoning.encrypted_content"}  # there is no reasoning to include
        if unknown := sorted(included - {LOGPROBS}):
            raise UnsupportedParameterError(
                f"This server does not include {shown(unknown[0])!r}: leave it out of 'include'.", "include"
            )
        if self.top_logprobs and not included:
            raise RequestError(f"top_logprobs needs {LOGPROBS!r} in 'include'.", "top_logprobs")
        system = [WireMessage.model_validate({"role": "system", "content": self.instructions})]
        messages: Sequence[WireMessage] = [*(system if self.instructions else ()), *self.input]
        same = {name: value for name in _CHAT_FIELDS if (value := getattr(self, name)) is not None}
        if included:
            same |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.text is not None and self.text.format is not None:
            same["response_format"] = self.text.format.as_response_format()
        try:
            return ChatRequest.model_validate({"messages": messages, "max_tokens": self.max_output_tokens} | same)
        except ValidationError as error:
            raise as_request_error(error) from None


Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str]
    logprobs: list[TokenLogprobs]


class OutputMessage(Answer):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputTokensDetails(Answer):
    """Parts of the prompt: images, positions that were in the cache, and those that are paid for writing: none."""

    cached_tokens: int
    cache_write_tokens: int
    image_tokens: int


class OutputTokensDetails(Answer):
    """Parts of the answer."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Tokens, as positions in the model: an image takes as many as it has features."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Answer):
    """The answer, or its state in a stream: `output` and `usage` are there at the end. Other fields are those of the
    request, or their defaults."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    text: dict[str, dict[str, Any]]
    tool_choice: Literal["none"]
    tools: list[str]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    metadata: dict[str, str]


class ResponseEvent(Answer):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    item: OutputMessage | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[TokenLogprobs] | None = None


def status_of(finish_reason: FinishReason) -> Status:
    """Of a finished answer."""
    return "completed" if finish_reason == "stop" else "incomplete"
