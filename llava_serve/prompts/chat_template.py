"""transformers' chat templates (Jinja), rendered to spans in which a user's text never becomes markup.

A template gets the texts as they are, so that its filters and conditions see what transformers shows them. Only what
spells a control token, or could become a part of one, stands between two marks while the template runs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser

from llava_serve.errors import RequestError, shown
from llava_serve.prompts.conversation import Arranged, Control, Ending, ImageSlot, Span, Text, merge_text
from llava_serve.prompts.template_sandbox import LimitedEnvironment, TemplateLimitError, render
from llava_serve.types import ImagePart, Message, TextPart

Form = Literal["parts", "string"]

_MARKS = range(0xF0000, 0x10FFFE)
"""Private-use characters: three that no text of the conversation holds become the marks."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A checkpoint's chat template, and how it is called. `chat_probe.judge` makes one.

    Attributes:
        text: the Jinja text.
        controls: names of the tokenizer's control tokens.
        image_token: what stands for an image in the rendered text.
        special_tokens: such as `bos_token`, which templates use by name.
        forms: by role, whether the content of a message is a list of parts or a string.
        writes_image: in the string form, the template writes an image's place by itself.
        closing: the control token after an answer, if there is one.
    """

    text: str
    controls: tuple[str, ...] = ()
    image_token: str = "<image>"
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    writes_image: bool = False
    closing: str | None = None

    @property
    def sets_line_breaks(self) -> bool:
        """Whether the template sets the line breaks around images; in a string, the caller does."""
        return self.forms.get("user", "parts") == "parts" or self.writes_image

    def render(self, asked: Arranged) -> list[Span]:
        """Renders a conversation.

        Raises:
            RequestError: the template refuses the conversation, has not one place for each image, or does not show the
                text that the answer goes on from.
        """
        system = [] if asked.system is None else [Message("system", (TextPart(asked.system),))]
        messages = [*system, *asked.turns]
        spans = self.spans(messages, asked.ending)
        images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        slots = sum(isinstance(span, ImageSlot) for span in spans)
        if slots != images:
            raise RequestError(
                f"The model's chat template has places for {slots} images in this conversation, which has {images}.",
                "messages",
            )
        return spans

    def spans(self, messages: Sequence[Message], ending: Ending = "answer") -> list[Span]:
        """As `render`, whatever the number of image slots."""
        patterns = _patterns(self.controls, self.image_token)
        texts = "".join(part.text for message in messages for part in message.parts if isinstance(part, TextPart))
        left, right, end = _unused_characters(texts)
        last = messages[-1].parts[-1] if ending == "continue" else None

        def asked(left: str, right: str) -> list[dict[str, Any]]:
            def written(part: TextPart | ImagePart) -> str:
                if isinstance(part, TextPart):
                    return patterns.marked(part.text, left, right) + (end if part is last else "")
                return "" if self.writes_image else self.image_token

            def content(message: Message) -> Any:
                if self.forms.get(message.role, "parts") == "string":
                    return "".join(map(written, message.parts))
                return [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": written(part)}
                    for part in message.parts
                ]

            return [{"role": message.role, "content": content(message)} for message in messages]

        marked, plain = asked(left, right), asked("", "")
        now = datetime.now().astimezone()
        prompt = self._run(marked, ending, now)
        if marked != plain and prompt.replace(left, "").replace(right, "") != self._run(plain, ending, now):
            raise RequestError(
                "The model's chat template changes, counts or compares a text that spells a part of a control token.",
                "messages",
            )
        if last is not None:
            prompt, found, _ = prompt.rpartition(end)
            if not found or end in prompt:
                raise RequestError("The model's chat template does not show the last message once.", "messages")
        pieces = re.split(f"({left}[^{left}{right}]*{right})", prompt)
        spans: list[Span] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                spans.append(Text(piece[1:-1]))
            elif left in piece or right in piece:
                raise RequestError(
                    "The model's chat template cuts a text where it spells a part of a control token.", "messages"
                )
            else:
                spans += patterns.split(piece)
        return merge_text(spans)

    def _run(self, messages: list[dict[str, Any]], ending: Ending, now: datetime) -> str:
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": ending == "answer",
            "strftime_now": lambda form: _formatted(now, form),
        }
        try:
            return render(compiled(self.text), {**variables, **self.special_tokens})
        except TemplateError as error:
            raise RequestError("The model's chat template cannot render this conversation.", "messages") from error


class _Patterns:
    """The names of the control tokens, and what can become a part of one."""

    def __init__(self, controls: Sequence[str], image_token: str) -> None:
        self._image_token = image_token
        names = sorted({*controls, image_token}, key=len, reverse=True)  # the longest first
        alternatives = "|".join(map(re.escape, names))
        self._names = re.compile(f"({alternatives})")
        # A template may change the case of a text.
        self._spelled = re.compile(alternatives, re.IGNORECASE)
        lower = [name.lower() for name in names]
        self._longest = max(map(len, lower))
        self._starts = {name[:i] for name in lower for i in range(1, len(name))}
        self._ends = {name[i:] for name in lower for i in range(1, len(name))}
        self._all = "\0".join(lower)

    def split(self, template_text: str) -> list[Span]:
        """Spans of what the template wrote."""
        return [
            Text(part) if not i % 2 else ImageSlot() if part == self._image_token else Control(part)
            for i, part in enumerate(self._names.split(template_text))
            if part
        ]

    def marked(self, text: str, left: str, right: str) -> str:
        """A user's text with marks around all that spells a control token, and around what could become a part of one
        together with the text beside it."""
        marked, at = "", 0
        for start, end in sorted(self._dangerous(text)):
            if end > at:
                start = max(start, at)
                marked += text[at:start] + left + text[start:end] + right
                at = end
        return marked + text[at:]

    def _dangerous(self, text: str) -> Iterator[tuple[int, int]]:
        yield from (match.span() for match in self._spelled.finditer(text))
        core = text.strip().lower()  # a template may strip a text
        first = len(text) - len(text.lstrip())
        last = first + len(core)
        if core and len(core) < self._longest and core in self._all:
            yield first, last
        sizes = range(min(self._longest, len(core)), 0, -1)
        if opening := next((size for size in sizes if core[:size] in self._ends), 0):
            yield first, first + opening
        if closing := next((size for size in sizes if core[-size:] in self._starts), 0):
            yield last - closing, last


@lru_cache(maxsize=8)
def _patterns(controls: tuple[str, ...], image_token: str) -> _Patterns:
    return _Patterns(controls, image_token)


def _unused_characters(text: str) -> list[str]:
    unused = list(itertools.islice((mark for number in _MARKS if (mark := chr(number)) not in text), 3))
    if len(unused) < 3:
        raise RequestError("The conversation holds too many kinds of private-use characters.", "messages")
    return unused


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; the published LLaVA-1.5 template has it. It renders
    nothing."""

    tags = {"generation"}  # noqa: RUF012, as the base class has it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)  # a model has one; compiling it takes longer than all other work on a small prompt
def compiled(template: str) -> Template:
    """A template with the filters and the function that transformers gives it, but for `strftime_now`.

    Raises:
        jinja2.TemplateError: it is none, or passes a limit.
    """
    extensions = [loopcontrols, _Generation]
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _refuse
    return environment.compiled(template)


def _formatted(now: datetime, form: str) -> str:
    if len(form) > 100 or re.search(r"%\W*\d", form):  # a width makes a text of any length
        raise TemplateLimitError("The form of a date is longer than 100 characters, or has a width.")
    return now.strftime(form)


def _refuse(message: str) -> None:
    raise RequestError(f"The model's chat template refuses the conversation: {shown(message)}", "messages")
