"""Judges a chat template before the first request: it renders small conversations, and what comes out decides how the
template is called."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from llava_serve.errors import CheckpointError, RequestError
from llava_serve.prompts.chat_template import ChatTemplate, Form, compiled
from llava_serve.prompts.conversation import Control, ImageSlot, Span, Text, chat_turn, prompt_text
from llava_serve.types import ImagePart, Message, Role, TextPart

# Digits: filters that change the case of a text leave them as they are.
_QUESTION, _OTHER, _NEXT = "7316042859", "4082917365", "9150836274"
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_ADVICE = "Correct it, or choose a template with --conv-mode."


class Judgement(NamedTuple):
    """A template that can be called, and what its users should know."""

    template: ChatTemplate
    notes: tuple[str, ...]


def judge(template: ChatTemplate) -> Judgement:
    """Finds out how a template is called: whether it takes the content of each role's messages as a list of parts or as
    a string, whether it writes an image's place by itself, and which token ends an answer.

    Args:
        template: with its text, the tokens and nothing else.

    Raises:
        CheckpointError: it has a syntax error, cannot render a question, leaves it out, or has not one place for one
            image.
    """
    try:
        compiled(template.text)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"The chat template has a syntax error in line {error.lineno}: {error.message}. {_ADVICE}"
        ) from error
    except TemplateError as error:
        raise CheckpointError(f"The chat template cannot be used: {error} {_ADVICE}") from error
    template = _for_questions(template)
    notes: list[str] = []
    for role in ("system", "assistant"):
        form, included = _form_of(template, role)
        template = replace(template, forms={**template.forms, role: form})
        if not included:
            notes.append(f"The chat template leaves out what a message of the {role} says.")
    return Judgement(replace(template, closing=_closing(template)), tuple(notes))


def _for_questions(template: ChatTemplate) -> ChatTemplate:
    """The template, called so that a question with an image comes out whole."""
    faults: list[str] = []
    calls: tuple[tuple[Form, bool], ...] = (("parts", False), ("string", False), ("string", True))
    for form, writes_image in calls:
        called = replace(template, forms=dict.fromkeys(_ROLES, form), writes_image=writes_image)
        fault = _fault(called)
        if fault is None:
            return called
        faults.append(fault)
    raise CheckpointError(f"The chat template {faults[0]} (as a string, it {faults[1]}). {_ADVICE}")


def _fault(template: ChatTemplate) -> str | None:
    """What is wrong with a rendered question with one image."""
    try:
        spans = template.spans([_user(template, _QUESTION)])
    except RequestError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        return f"cannot render a question with an image: {type(reason).__name__}: {str(reason)[:200]}"
    slots = sum(isinstance(span, ImageSlot) for span in spans)
    if not _includes(spans, _QUESTION):
        return "leaves out the text of a question"
    return None if slots == 1 else f"has {slots} places for one image"


def _form_of(template: ChatTemplate, role: Role) -> tuple[Form, bool]:
    """The form in which a role's text comes out, that of questions first; and whether it comes out in any, as far as
    the template accepts the role."""
    asked = template.forms["user"]
    others: tuple[Form, ...] = (asked, "string" if asked == "parts" else "parts")
    accepted = False
    for form in others:
        called = replace(template, forms={**template.forms, role: form})
        try:
            spans = called.spans(_conversation(called, role))
        except RequestError:
            continue
        accepted = True
        if _includes(spans, _OTHER):
            return form, True
    return asked, not accepted


def _closing(template: ChatTemplate) -> str | None:
    """The control token that follows an answer with at most white space between."""
    try:
        spans = template.spans(_conversation(template, "assistant"))
    except RequestError:
        return None
    for span, following in itertools.pairwise(spans):
        if isinstance(span, Text) and _OTHER in span.text and isinstance(following, Control):
            ends = span.text.rpartition(_OTHER)[2].strip() == ""
            return following.token if ends and following.token != template.special_tokens.get("bos_token") else None
    return None


def _user(template: ChatTemplate, text: str) -> Message:
    message = Message("user", (ImagePart(b""), TextPart(text)))
    return message if template.sets_line_breaks else chat_turn(message)


def _conversation(template: ChatTemplate, role: Role) -> list[Message]:
    said = Message(role, (TextPart(_OTHER),))
    if role == "system":
        return [said, _user(template, _QUESTION)]
    return [_user(template, _QUESTION), said, Message("user", (TextPart(_NEXT),))]


def _includes(spans: Sequence[Span], text: str) -> bool:
    """Whether a text comes out by itself, and not in Python's notation of a list of parts."""
    prompt = prompt_text(spans)
    return text in prompt and "'type': 'text'" not in prompt
