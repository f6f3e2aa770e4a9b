"""Values that processes exchange: options, messages, the prepared prompt, chunks. Plain values and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

IMAGE_TOKEN_ID = -200
"""The placeholder of an image. The original's value: never an id of a vocabulary."""

PROMPT_VERSION = 3
"""Of `PreparedPrompt`'s layout. A change of its fields is a new version."""

StageTimes = tuple[tuple[str, float], ...]
"""Seconds of stages of a request, in order; `llava_serve.metrics.definitions.STAGES` has their names."""

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text as its author typed it: markup in it has no effect."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture: its encoded bytes, or where they are (`data:` URL, `http(s):` URL)."""

    source: str | bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]


ImageOrder = Literal["images_first", "as_sent"]


@dataclass(frozen=True, slots=True)
class Conversation(Sequence[Message]):
    """Messages, and how their prompt is made. A plain sequence of messages is one with the defaults.

    Attributes:
        continue_final_message: the answer goes on from the last message, which is the assistant's. None: if the last
            message is the assistant's, and `add_generation_prompt` is not set.
        add_generation_prompt: the prompt ends with the mark of the assistant's turn. None: unless the answer goes on
            from the last message.
        image_order: where the images of a turn stand in templates other than a checkpoint's own. `images_first`: before
            its text, unless text stands between images.
    """

    messages: tuple[Message, ...]
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    image_order: ImageOrder = "images_first"

    @overload
    def __getitem__(self, at: int) -> Message: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Message]: ...

    def __getitem__(self, at: int | slice) -> Message | Sequence[Message]:
        return self.messages[at]

    def __len__(self) -> int:
        return len(self.messages)


@dataclass(frozen=True, slots=True)
class Query:
    """A question as the original's command line takes it: `<image-placeholder>` marks where each image goes; without
    one, the images stand before the text, each on its own line."""

    text: str
    images: tuple[ImagePart, ...] = ()


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt without a template and without images: a text, in which markup has no effect, or token ids.

    Attributes:
        add_special_tokens: a text gets the tokens that the tokenizer begins a prompt with.
    """

    prompt: str | tuple[int, ...]
    add_special_tokens: bool = True


Asked = Query | RawPrompt | Sequence[Message]


def image_bytes(asked: Asked) -> int:
    """The bytes of all images of a prompt, as they are sent."""
    if isinstance(asked, RawPrompt):
        return 0
    if isinstance(asked, Query):
        images = list(asked.images)
    else:
        images = [part for message in asked for part in message.parts if isinstance(part, ImagePart)]
    return sum(len(image.source) for image in images)


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as model input, made without torch; sent from the CPU tier to the GPU tier.

    Attributes:
        token_ids: int32 [num_tokens]. An image takes as many positions as it has features, each `IMAGE_TOKEN_ID`, so
            that the length is the KV length.
        image_spans: half-open [start, end) positions of each image, in order.
        tiles: per image uint8 [tiles, height, width, 3], RGB, not normalised.
        image_sizes: per image (width, height) in pixels before tiling.
        digests: per image, over pixels, size, mode and processing, and over `cache_salt` where there is one.
        prompt: the rendered text, `<image>` where an image goes.
        stop_token_ids: end tokens of the template, beside the checkpoint's own.
        stop: stop strings of the template, beside the request's own.
        cache_salt: prompts share what is cached of them only where they have the same, as in vLLM.
        continues: the answer goes on from the text at the prompt's end: white space at its start is a part of it.
        prompt_key: of the model that it is prepared for, on Serve (`ModelOptions.prompt_key`).
        stages: how long its stages took.
        version: of this layout, since rolling upgrades mix releases. The engine refuses another one by name.
    """

    token_ids: NDArray[np.int32]
    image_spans: tuple[tuple[int, int], ...] = ()
    tiles: tuple[NDArray[np.uint8], ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    digests: tuple[str, ...] = ()
    prompt: str = ""
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    cache_salt: str = ""
    continues: bool = False
    prompt_key: str = ""
    stages: StageTimes = field(default=(), compare=False)
    version: int = PROMPT_VERSION

    def __getstate__(self) -> dict[str, Any]:
        """By name, so that the version can be read whatever fields another release has."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in {each.name for each in fields(self)} & state.keys():
            object.__setattr__(self, name, state[name])

    @property
    def num_tokens(self) -> int:
        """Positions in the KV cache, images merged in."""
        return len(self.token_ids)

    @property
    def num_image_tokens(self) -> int:
        """Those of them that are images'."""
        return sum(end - start for start, end in self.image_spans)

    @property
    def input_ids(self) -> list[int]:
        """The original's form: one `IMAGE_TOKEN_ID` per image."""
        ids: list[int] = []
        at = 0
        for start, end in self.image_spans:
            ids += self.token_ids[at : start + 1].tolist()
            at = end
        ids += self.token_ids[at:].tolist()
        return ids


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A produced token, its natural log-probability, and the best alternatives, best first, as (id, text, logprob).

    `token_bytes` and `top_bytes` are the tokens in UTF-8: a token can be a part of a character. A control token of a
    prompt has none. `rank`: of a prompt's token, how many tokens are as likely or likelier, 1 for the likeliest.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    token_bytes: bytes = b""
    top_bytes: tuple[bytes, ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new in one choice of a stream. Joined, the texts are `Completion.text`.

    Attributes:
        index: of the choice.
        text: new text; may be empty while a character or a stop string is incomplete.
        token_ids: new ids; one or more, except in a last chunk that has only the finish reason.
        finish_reason: set on the choice's last chunk, and only there.
        prompt_logprobs: on the first chunk of choice 0, where asked for: of each position of the prompt, None for an
            image's. The first token has NaN: nothing comes before it.
        stages: on the first chunk of a choice: how long the stages of the engine took.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stages: StageTimes = field(default=(), compare=False)
