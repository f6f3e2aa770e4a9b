"""Renders messages to spans: text, control tokens, image slots. No rendered string is parsed again, so that a
user's text never becomes a control token or an image slot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from llava_serve.errors import RequestError, shown
from llava_serve.prompts.templates import TEMPLATES, Style, Template
from llava_serve.types import Conversation, ImageOrder, ImagePart, Message, Role, TextPart

IMAGE_PLACEHOLDER = "<image-placeholder>"
"""Marks where an image goes in a query; the original's word."""


@dataclass(frozen=True, slots=True)
class Text:
    """Characters that are encoded as text, whatever they spell."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """A token by its name, from a template only. It is text if the vocabulary has no such token."""

    token: str


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of an image. The n-th slot of a prompt takes its n-th image."""


Span = Text | Control | ImageSlot

Ending = Literal["answer", "continue", "closed"]
Parts = list[TextPart | ImagePart]

_CONTROL = re.compile(r"(<\|[a-z_]+\|>|</?s>|<im_start>|<im_end>)")


def control_spans(template_text: str) -> list[Span]:
    """Splits a piece of a *template* (never of a user's text) at the names of control tokens."""
    parts = _CONTROL.split(template_text)
    return [Control(part) if i % 2 else Text(part) for i, part in enumerate(parts) if part]


def prompt_text(spans: Iterable[Span]) -> str:
    """The prompt as text: `<image>` where an image goes."""
    return "".join(
        "<image>" if isinstance(span, ImageSlot) else span.text if isinstance(span, Text) else span.token
        for span in spans
    )


def merge_text(spans: Iterable[Span]) -> list[Span]:
    """Joins adjacent texts: a token may span a template's text and a user's."""
    merged: list[Span] = []
    for is_text, run in groupby(spans, lambda span: isinstance(span, Text)):
        if not is_text:
            merged += run
        elif text := "".join(span.text for span in run if isinstance(span, Text)):
            merged.append(Text(text))
    return merged


def query_message(query: str, images: Sequence[ImagePart], *, line_breaks: bool = True) -> Message:
    """A query as the original takes it: `<image-placeholder>` marks where each image goes; without one, the images
    stand before the text, each on its own line.

    Args:
        query: the text.
        images: in order.
        line_breaks: add a line break after each image before the text; a chat template adds its own.

    Raises:
        RequestError: placeholders and images differ in number.
    """
    pieces = query.split(IMAGE_PLACEHOLDER)
    if len(pieces) == 1:
        leading = [part for image in images for part in (image, TextPart("\n"))] if line_breaks else images
        return Message("user", (*leading, TextPart(query)))
    if len(pieces) - 1 != len(images):
        raise RequestError(f"The query has {len(pieces) - 1} image placeholders for {len(images)} images.")
    parts: list[TextPart | ImagePart] = [TextPart(pieces[0])]
    for image, text in zip(images, pieces[1:], strict=True):
        parts += [image, TextPart(text)]
    return Message("user", tuple(parts))


def chat_turn(turn: Message, image_order: ImageOrder = "images_first") -> Message:
    """A turn of a chat with its line breaks, for the templates that are rendered here.

    The images stand before the text, each on its own line, as the original's server, transformers' templates and vLLM
    have them, and as models were trained; where text stands between images their order is kept. Texts next to each
    other are joined by a line break, as vLLM joins them.

    Args:
        image_order: `as_sent` keeps the order in any case.
    """
    parts = [part for part in turn.parts if isinstance(part, ImagePart) or part.text]
    texts = [i for i, part in enumerate(parts) if isinstance(part, TextPart)]
    images = [i for i, part in enumerate(parts) if isinstance(part, ImagePart)]
    if image_order == "images_first" and not any(images[0] < i < images[-1] for i in texts if images):
        parts = [*(parts[i] for i in images), *(parts[i] for i in texts)]
    laid_out: Parts = []
    last_text = max((i for i, part in enumerate(parts) if isinstance(part, TextPart)), default=-1)
    for i, part in enumerate(parts):
        joins = isinstance(part, TextPart) and i > 0 and isinstance(parts[i - 1], TextPart)
        laid_out += [TextPart("\n"), part] if joins else [part]
        if isinstance(part, ImagePart) and i < last_text:
            laid_out.append(TextPart("\n"))
    return Message(turn.role, tuple(laid_out))


@dataclass(frozen=True, slots=True)
class Arranged:
    """A conversation as templates take it.

    Attributes:
        system: the text of the leading system messages, or None.
        turns: no two neighbours are of one role, and none is empty.
        ending: how the prompt ends: with the mark of the assistant's turn (`answer`), within the assistant's last turn
            (`continue`), or with the last turn (`closed`).
    """

    system: str | None
    turns: list[Message]
    ending: Ending


def arrange(messages: Sequence[Message], *, line_breaks: bool = True) -> Arranged:
    """Brings a conversation into the order that templates take.

    Leading system messages are joined by line breaks; later ones begin the user's next turn. Neighbours of one role are
    joined by a line break. A message without content is left out.

    Args:
        line_breaks: put them into the turns; `chat_turn` adds its own.

    Raises:
        RequestError: there is no turn, the user's last message is empty, an image is outside the user's turns, or the
            flags of a `Conversation` do not fit its last message.
    """

    def after(first: Parts, parts: Parts) -> Parts:
        return [TextPart("\n"), *parts] if line_breaks and first and parts else parts

    rest = list(messages)
    system: list[str] = []
    while rest and rest[0].role == "system":
        system += [part.text for part in _texts(rest.pop(0))]
    if rest and rest[-1].role == "user" and _is_empty(rest[-1]):
        raise RequestError("The user's message is empty.", "messages")
    joined: list[tuple[Role, Parts]] = []
    waiting: Parts = []  # of later system messages
    for message in [*rest, Message("user", ())]:  # an empty turn of the user ends the conversation
        if message.role != "user":
            texts = _texts(message)
        if message.role == "system":
            waiting += after(waiting, [*texts])
            continue
        role, parts = message.role, [] if _is_empty(message) else list(message.parts)
        if role == "user":
            parts, waiting = [*waiting, *after(waiting, parts)], []
        if joined and joined[-1][0] == role:
            joined[-1][1].extend(after(joined[-1][1], parts))
        elif parts:
            joined.append((role, parts))
    turns = [Message(role, tuple(parts)) for role, parts in joined]
    if not turns:
        raise RequestError("The conversation has no message of the user.", "messages")
    return Arranged("\n".join(system) if system else None, turns, _ending(messages, turns[-1].role))


def _is_empty(message: Message) -> bool:
    return not any(isinstance(part, ImagePart) or part.text for part in message.parts)


def _ending(messages: Sequence[Message], last: Role) -> Ending:
    flags = messages if isinstance(messages, Conversation) else Conversation(())
    continues = flags.continue_final_message
    if continues is None:
        continues = last == "assistant" and not flags.add_generation_prompt
    if continues and flags.add_generation_prompt:
        raise RequestError(
            "Give continue_final_message or add_generation_prompt, not both: an answer goes on from the last message, "
            "or begins a turn.",
            "add_generation_prompt",
        )
    if continues and last != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of the assistant that has text.", "continue_final_message"
        )
    if continues:
        return "continue"
    return "closed" if flags.add_generation_prompt is False else "answer"


def _texts(message: Message) -> list[TextPart]:
    texts = [part for part in message.parts if isinstance(part, TextPart)]
    if len(texts) != len(message.parts):
        raise RequestError(f"An image may only stand in a user message, not in one of the {message.role}.", "messages")
    return texts


def render(
    conv_mode: str,
    system: str | None,
    turns: Sequence[Message],
    *,
    ending: Ending = "answer",
    image_marks: bool = False,
) -> list[Span]:
    """Renders a conversation, up to the point where the assistant's answer begins.

    Args:
        conv_mode: key of the template.
        system: replaces the template's system message; None keeps it.
        turns: alternating.
        ending: see `Arranged`.
        image_marks: each image stands between `<im_start>` and `<im_end>` (`mm_use_im_start_end`).

    Raises:
        RequestError: no such template.
    """
    template = TEMPLATES.get(conv_mode)
    if template is None:
        raise RequestError(f"There is no template {shown(conv_mode)!r}; there are {', '.join(TEMPLATES)}.", "conv_mode")
    spans: list[Span] = []
    system_spans: list[Span] = [Text(template.system if system is None else system)]
    if template.style is not Style.LLAMA_2:
        spans += control_spans(template.system_mark) + system_spans
        spans += control_spans(template.sep if template.style is not Style.PLAIN else "")
    examples = [(role, control_spans(text)) for role, text in zip(_ROLES, template.examples, strict=False)]
    talk = examples + [(turn.role, _content(turn, image_marks)) for turn in turns]
    if template.style is Style.LLAMA_2 and talk[0][0] == "assistant":
        talk.insert(0, ("user", []))  # its system message stands in a turn of the user
    for i, (role, content) in enumerate(talk):
        closed = not (ending == "continue" and i == len(talk) - 1)
        if template.style is Style.LLAMA_2:
            has_system = i == 0 and prompt_text(system_spans) != ""
            content = _wrap_system(system_spans, content) if has_system else content
            spans += _inst_turn(template, role, content, first=i == 0, closed=closed)
        else:
            spans += _turn(template, role, content, closed=closed)
    return merge_text(spans + (_open_answer(template) if ending == "answer" else []))


_ROLES: tuple[Role, Role] = ("user", "assistant")


def _content(turn: Message, image_marks: bool) -> list[Span]:
    image: list[Span] = [Control("<im_start>"), ImageSlot(), Control("<im_end>")] if image_marks else [ImageSlot()]
    spans: list[Span] = []
    for part in turn.parts:
        spans += image if isinstance(part, ImagePart) else [Text(part.text)]
    return spans


def _turn(template: Template, role: Role, content: list[Span], *, closed: bool) -> list[Span]:
    mark = template.user if role == "user" else template.assistant
    colon = ": " if template.style in (Style.SINGLE, Style.TWO) else ""
    end = template.sep if role == "user" else template.end_of_answer
    return [*control_spans(mark + colon), *content, *(control_spans(end) if closed else ())]


def _inst_turn(template: Template, role: Role, content: list[Span], *, first: bool, closed: bool) -> list[Span]:
    if role == "assistant":
        return [Text(" "), *content, *([Text(" "), *control_spans(template.sep2)] if closed else ())]
    opening = "" if first else template.sep
    return [*control_spans(opening + template.user), *content, Text(template.assistant)]


def _wrap_system(system: list[Span], content: list[Span]) -> list[Span]:
    return [Text("<<SYS>>\n"), *system, Text("\n<</SYS>>\n\n"), *content]


def _open_answer(template: Template) -> list[Span]:
    if template.style in (Style.LLAMA_2, Style.PLAIN):
        return []
    return control_spans(template.assistant + ("" if template.style is Style.MPT else ":"))
