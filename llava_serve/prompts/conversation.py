"""Renders messages to spans: text, control tokens, image slots. No rendered string is parsed again, so that a
user's text never becomes a control token or an image slot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from llava_serve.errors import RequestError, shown
from llava_serve.prompts.templates import TEMPLATES, Style, Template
from llava_serve.types import ImagePart, Message, Role, TextPart

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


def chat_message(message: Message) -> Message:
    """A chat message with its line breaks: one after each image that has text anywhere after it."""
    parts: list[TextPart | ImagePart] = []
    last_text = max((i for i, part in enumerate(message.parts) if isinstance(part, TextPart) and part.text), default=-1)
    for i, part in enumerate(message.parts):
        parts.append(part)
        if isinstance(part, ImagePart) and i < last_text:
            parts.append(TextPart("\n"))
    return Message(message.role, tuple(parts))


def split_system(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """Checks the order of a conversation and splits its system message off.

    Returns:
        The system text, or None; and the turns, adjacent ones of one role joined by a newline.

    Raises:
        RequestError: the conversation is empty, or does not begin and end with the user; an image is outside the
            user's turns.
    """
    system: str | None = None
    rest = list(messages)
    if rest and rest[0].role == "system":
        system = "".join(part.text for part in _texts(rest.pop(0)))
    joined: list[tuple[Role, list[TextPart | ImagePart]]] = []
    for message in rest:
        if message.role == "system":
            raise RequestError("A system message may only stand first.", "messages")
        if message.role == "assistant":
            _texts(message)
        if joined and joined[-1][0] == message.role:
            joined[-1][1].extend((TextPart("\n"), *message.parts))
        else:
            joined.append((message.role, list(message.parts)))
    turns = [Message(role, tuple(parts)) for role, parts in joined]
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise RequestError("The conversation must begin and end with a user message.", "messages")
    for turn in turns:
        if not any(isinstance(part, ImagePart) or part.text for part in turn.parts):
            raise RequestError(f"A message of the {turn.role} is empty.", "messages")
    return system, turns


def _texts(message: Message) -> list[TextPart]:
    texts = [part for part in message.parts if isinstance(part, TextPart)]
    if len(texts) != len(message.parts):
        raise RequestError(f"An image may only stand in a user message, not in one of the {message.role}.", "messages")
    return texts


def render(conv_mode: str, system: str | None, turns: Sequence[Message], *, image_marks: bool = False) -> list[Span]:
    """Renders a conversation, up to the point where the assistant's answer begins.

    Args:
        conv_mode: key of the template.
        system: replaces the template's system message; None keeps it.
        turns: alternating; the first and the last one are the user's.
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
    for i, (role, content) in enumerate(talk):
        if template.style is Style.LLAMA_2:
            has_system = i == 0 and prompt_text(system_spans) != ""
            content = _wrap_system(system_spans, content) if has_system else content
            spans += _inst_turn(template, role, content, first=i == 0)
        else:
            spans += _turn(template, role, content)
    return merge_text(spans + _open_answer(template))


_ROLES: tuple[Role, Role] = ("user", "assistant")


def _content(turn: Message, image_marks: bool) -> list[Span]:
    image: list[Span] = [Control("<im_start>"), ImageSlot(), Control("<im_end>")] if image_marks else [ImageSlot()]
    spans: list[Span] = []
    for part in turn.parts:
        spans += image if isinstance(part, ImagePart) else [Text(part.text)]
    return spans


def _turn(template: Template, role: Role, content: list[Span]) -> list[Span]:
    mark = template.user if role == "user" else template.assistant
    colon = ": " if template.style in (Style.SINGLE, Style.TWO) else ""
    end = template.sep if role == "user" else template.end_of_answer
    return [*control_spans(mark + colon), *content, *control_spans(end)]


def _inst_turn(template: Template, role: Role, content: list[Span], *, first: bool) -> list[Span]:
    if role == "assistant":
        return [Text(" "), *content, Text(" "), *control_spans(template.sep2)]
    opening = "" if first else template.sep
    return [*control_spans(opening + template.user), *content, Text(template.assistant)]


def _wrap_system(system: list[Span], content: list[Span]) -> list[Span]:
    return [Text("<<SYS>>\n"), *system, Text("\n<</SYS>>\n\n"), *content]


def _open_answer(template: Template) -> list[Span]:
    if template.style in (Style.LLAMA_2, Style.PLAIN):
        return []
    return control_spans(template.assistant + ("" if template.style is Style.MPT else ":"))
