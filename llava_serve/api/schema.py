"""The request as it stands on the wire: OpenAI's chat completion, and our own fields beside it.

A field that is not declared here is kept as an extra, so that `extras` can tell "asks for nothing" from "asks for
something that this server does not do".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOPS = 16
"""OpenAI takes 4; each is looked for at every token, so there is a bound."""


class Wire(BaseModel):
    """Base: JSON types are taken as they are (no "5" for 5), and null is the same as absent."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class ImageUrl(Wire):
    """Where a picture is.

    Attributes:
        url: a `data:` URL with the picture in base64.
        detail: OpenAI's hint at what to spend on the picture; accepted and not followed, as vLLM does, since a
            checkpoint reads every picture in the one way that it was trained on.
    """

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(Wire):
    """A piece of a message: text, or a picture where it stands.

    Attributes:
        type: which of the other two fields is set.
    """

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


def _as_parts(content: Any) -> Any:
    """Plain text is one part; so the rest of the house knows lists only."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class WireMessage(Wire):
    """One turn.

    Attributes:
        role: `developer` is OpenAI's newer name for `system`.
        content: a text, or parts in any order; pictures stand in the user's turns only.
        name: of the speaker; accepted and not looked at, since no template has a place for it.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]
    name: str | None = None


class StreamOptions(Wire):
    """How a stream ends.

    Attributes:
        include_usage: one more event before `[DONE]` tells the usage.
    """

    include_usage: bool | None = None


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]


class ChatRequest(Wire):
    """A question. Defaults and ranges that are not written here are those of `SamplingParams`.

    Attributes:
        model: a name from `/v1/models`.
        messages: the conversation, oldest turn first; the last one is the user's.
        max_tokens, max_completion_tokens: two names for the bound on the answer.
        temperature: 0 takes the likeliest token each time.
        top_p: draws from the smallest set of tokens that has this mass.
        stop: strings that end the answer.
        seed: the same seed and request give the same answer.
        n: answers to this question.
        logprobs: tell the log-probability of each token.
        top_logprobs: and that of so many alternatives.
        presence_penalty, frequency_penalty: as OpenAI defines them.
        stream: send the answer as it comes, as server-sent events.
        stream_options: of the stream.
        user: an opaque name of the asker; accepted and not looked at.
        top_k: draws from the so many likeliest tokens; 0 from all. Ours.
        num_beams: beam search above 1. Ours.
        repetition_penalty: above 1 makes what was said less likely. Ours.
        conv_mode: the prompt template, where the model's own shall not be used. Ours.
        ignore_eos: go on to `max_tokens` whatever the model says. Ours.
        timeout: seconds that the answer may take, from the arrival of the request. Ours.
    """

    model: str
    messages: Annotated[list[WireMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Annotated[Stops | None, BeforeValidator(_as_list, json_schema_input_type=str | Stops | None)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int | None = None
    num_beams: int | None = None
    repetition_penalty: float | None = None
    conv_mode: str | None = None
    ignore_eos: bool | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
