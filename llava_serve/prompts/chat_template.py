"""transformers' chat templates (Jinja), rendered to spans in which a user's text never becomes markup."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_serve.errors import RequestError
from llava_serve.prompts.conversation import Arranged, ImageSlot, Span, Text, control_spans, merge_text
from llava_serve.types import ImagePart, TextPart

# Private-use characters mark the texts while the template runs: all other output is the template's own.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000(\\d+)\ue001|<image>")


def render_chat_template(template: str, asked: Arranged, special_tokens: dict[str, str]) -> list[Span]:
    """Renders a conversation up to where the assistant's answer begins.

    Args:
        template: the Jinja text.
        asked: the conversation.
        special_tokens: such as `bos_token`, which templates use by name.

    Raises:
        RequestError: the template refuses the conversation.
    """
    texts: list[str] = []

    def marked(text: str) -> str:
        core = text.strip()
        texts.append(core)
        # White space stays outside the marks, so that a template can trim it.
        left = text[: len(text) - len(text.lstrip())] if core else ""
        right = text[len(text.rstrip()) :]
        return left + _MARK.format(len(texts) - 1) + right

    messages: list[dict[str, Any]] = []
    if asked.system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": marked(asked.system)}]})
    for turn in asked.turns:
        content = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": marked(part.text)}
            for part in turn.parts
        ]
        messages.append({"role": turn.role, "content": content})
    prompt = _run(template, messages, special_tokens, opens_answer=asked.ending == "answer")
    if asked.ending == "continue":
        last = asked.turns[-1].parts[-1]
        assert isinstance(last, TextPart), "the last turn is the assistant's"
        prompt = _up_to_text(prompt, len(texts) - 1, last.text)
    spans: list[Span] = []
    at = 0
    for match in _MARKED.finditer(prompt):
        spans += control_spans(prompt[at : match.start()])
        spans.append(ImageSlot() if match[1] is None else Text(texts[int(match[1])]))
        at = match.end()
    return merge_text(spans + control_spans(prompt[at:]))


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; the published LLaVA-1.5 template has it. It renders
    nothing."""

    tags = {"generation"}  # noqa: RUF012, as the base class has it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _up_to_text(prompt: str, number: int, text: str) -> str:
    """The prompt up to the end of a text, with the white space that ends it."""
    shown, mark, _ = prompt.rpartition(_MARK.format(number))
    if not mark:
        raise RequestError("The model's chat template does not show the last message.", "messages")
    return shown + mark + text[len(text.rstrip()) :]


def _run(template: str, messages: list[dict[str, Any]], special_tokens: dict[str, str], *, opens_answer: bool) -> str:
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=opens_answer, **special_tokens)
    except TemplateError as error:
        raise RequestError("The model's chat template cannot render this conversation.", "messages") from error


@lru_cache(maxsize=8)  # a model has one; compiling it takes longer than all other work on a small prompt
def _compiled(template: str) -> Template:
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise RequestError(f"The model's chat template refuses the conversation: {message[:100]}", "messages")
