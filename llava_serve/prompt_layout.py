"""What is asked to token ids, before an image is read: the template is rendered and its texts are tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_serve.checkpoints import CheckpointSpec
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError, PromptTooLongError, RequestError
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import (
    Arranged,
    Control,
    Span,
    arrange,
    chat_turn,
    control_spans,
    prompt_text,
    query_message,
    render,
)
from llava_serve.prompts.templates import CHAT_TEMPLATE, TEMPLATES
from llava_serve.text.tokenizer import Tokenizer
from llava_serve.types import Asked, Conversation, ImagePart, Message, Query, RawPrompt, TextPart


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A prompt before its images are decoded.

    Attributes:
        input_ids: one `IMAGE_TOKEN_ID` per image.
        prompt: the rendered text.
        images, paths: the images, and where each stands in the request.
        stop_token_ids, stop: how the template ends an answer.
        continues: the answer goes on from the prompt's text.
    """

    input_ids: list[int]
    prompt: str
    images: Sequence[ImagePart] = ()
    paths: Sequence[str] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    continues: bool = False


class PromptRenderer:
    """Lays prompts out for one checkpoint. Immutable."""

    def __init__(self, spec: CheckpointSpec, options: ImageOptions, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.options = options
        self.tokenizer = tokenizer

    def lay_out(self, asked: Asked, conv_mode: str | None, most: int) -> PromptLayout:
        """Renders and tokenizes.

        Args:
            conv_mode: overrides the checkpoint's template.
            most: a text that certainly has as many tokens is refused.

        Raises:
            RequestError: the conversation cannot be used; `PromptTooLongError` says got and limit.
        """
        if isinstance(asked, RawPrompt):
            return self._raw(asked, most)
        key = conv_mode or self.spec.conv_mode
        own = self._own_template(key)
        own_layout = own is not None and own.sets_line_breaks  # it lays images and texts out
        if isinstance(asked, Query):
            arranged = arrange([query_message(asked.text, asked.images, line_breaks=not own_layout)])
        else:
            arranged = arrange(asked, line_breaks=own_layout)
            if not own_layout:
                order = asked.image_order if isinstance(asked, Conversation) else "images_first"
                arranged = replace(arranged, turns=[chat_turn(turn, order) for turn in arranged.turns])
        images = self._check_counts(arranged, most)
        spans = self._render(key, arranged)
        ids, (stop_token_ids, stop) = self.tokenizer.encode(spans), self._ends(key)
        continues = arranged.ending == "continue"
        return PromptLayout(ids, prompt_text(spans), images, _paths_of_images(asked), stop_token_ids, stop, continues)

    def _raw(self, asked: RawPrompt, most: int) -> PromptLayout:
        if isinstance(asked.prompt, str):
            self._check_length(len(asked.prompt), most)
            ids = self.tokenizer.encode_text(asked.prompt, add_special_tokens=asked.add_special_tokens)
            text = asked.prompt
        else:
            check_ids(asked.prompt, self.tokenizer.size, "prompt")
            ids = list(asked.prompt)
            text = self.tokenizer.decode(ids)
        if not ids:
            raise RequestError("The prompt is empty.", "prompt")
        return PromptLayout(ids, text, continues=True)

    def _check_counts(self, asked: Arranged, most: int) -> list[ImagePart]:
        """The images of a conversation. Refuses too many or too large ones, and a text that cannot fit: the work on all
        of them grows with them."""
        parts = [TextPart(asked.system or ""), *(part for turn in asked.turns for part in turn.parts)]
        images = [part for part in parts if isinstance(part, ImagePart)]
        if len(images) > self.options.max_per_request:
            raise InvalidImageError(
                f"The request has {len(images)} images, those of earlier turns included; at most "
                f"{self.options.max_per_request} are accepted.",
                "messages",
            )
        size = sum(len(part.source) if isinstance(part.source, bytes) else len(part.source) * 3 // 4 for part in images)
        if size > self.options.max_total_bytes:
            raise InvalidImageError(
                f"The request's images take {size:,} bytes; at most {self.options.max_total_bytes:,} are accepted.",
                "messages",
            )
        self._check_length(sum(len(part.text) for part in parts if isinstance(part, TextPart)), most)
        return images

    def _check_length(self, characters: int, most: int) -> None:
        least = characters // self.tokenizer.longest
        if least >= most:
            raise PromptTooLongError(least, self.spec.context_length - 1, at_least=True)

    def _render(self, key: str, asked: Arranged) -> list[Span]:
        if own := self._own_template(key):
            return own.render(asked)
        return render(key, asked.system, asked.turns, ending=asked.ending, image_marks=self.spec.mm_use_im_start_end)

    def _own_template(self, key: str) -> ChatTemplate | None:
        """The checkpoint's own template, if it renders the prompt."""
        return self.spec.chat_template if key == CHAT_TEMPLATE else None

    def _ends(self, key: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """How an answer ends in this template: by one token where the vocabulary has it, else by a stop string."""
        if own := self._own_template(key):
            ends = map(self.tokenizer.token_id, filter(None, (own.special_tokens.get("eos_token"), own.closing)))
            return tuple({end for end in ends if end is not None}), ()
        end = TEMPLATES[key].end_of_answer if key in TEMPLATES else ""
        if not end:
            return (), ()
        token_id = self.tokenizer.token_id(end) if isinstance(control_spans(end)[0], Control) else None
        return ((), (end,)) if token_id is None else ((token_id,), ())


def check_ids(token_ids: Sequence[int], vocabulary: int, param: str) -> None:
    """Raises `RequestError` for an id outside the vocabulary; `param` names the field."""
    if not all(0 <= each < vocabulary for each in token_ids):
        raise RequestError(f"{param} has a token id outside 0 to {vocabulary - 1}.", param)


def _paths_of_images(asked: Query | Sequence[Message]) -> list[str]:
    """Where each image stands, as a request names it."""
    if isinstance(asked, Query):
        return [f"images[{i}]" for i in range(len(asked.images))]
    return [
        f"messages[{i}].content[{j}]"
        for i, message in enumerate(asked)
        for j, part in enumerate(message.parts)
        if isinstance(part, ImagePart)
    ]
