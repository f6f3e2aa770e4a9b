"""Conversations in the order that templates take: what is joined, moved, refused, and how a prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from llava_serve.errors import RequestError
from llava_serve.prompts.conversation import (
    Ending,
    arrange,
    prompt_text,
    render,
)
from llava_serve.types import Conversation, ImagePart, Message, Role, TextPart


def said(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


def shape(messages: Sequence[Message]) -> tuple[str | None, list[tuple[Role, str]], Ending]:
    """The system message, the roles and texts of the turns, and the ending."""
    arranged = arrange(messages)
    turns = [(turn.role, prompt_text(render("plain", None, [turn])).removesuffix("\n")) for turn in arranged.turns]
    return arranged.system, turns, arranged.ending


Q, A = said("user", "Q"), said("assistant", "A")
SHAPES: dict[str, tuple[list[Message], tuple[str | None, list[tuple[Role, str]], Ending]]] = {
    "two leading system messages": (
        [said("system", "S"), said("system", "T"), Q],
        ("S\nT", [("user", "Q")], "answer"),
    ),
    "an empty system message": ([said("system", ""), Q], ("", [("user", "Q")], "answer")),
    "a system message without content": ([Message("system", ()), Q], (None, [("user", "Q")], "answer")),
    "a later system message": (
        [Q, said("system", "S"), A, Q],
        (None, [("user", "Q"), ("assistant", "A"), ("user", "S\nQ")], "answer"),
    ),
    "two later ones": (
        [Q, A, said("system", "S"), said("system", "T"), Q],
        (None, [("user", "Q"), ("assistant", "A"), ("user", "S\nT\nQ")], "answer"),
    ),
    "a last system message": ([Q, said("system", "S")], (None, [("user", "Q\nS")], "answer")),
    "a system message after the last answer": (
        [Q, A, said("system", "S")],
        (None, [("user", "Q"), ("assistant", "A"), ("user", "S")], "answer"),
    ),
    "two turns of one role": (
        [Q, Q, A, A, Q],
        (None, [("user", "Q\nQ"), ("assistant", "A\nA"), ("user", "Q")], "answer"),
    ),
    "the assistant first": ([A, Q], (None, [("assistant", "A"), ("user", "Q")], "answer")),
    "the assistant last": ([Q, A], (None, [("user", "Q"), ("assistant", "A")], "continue")),
    "an empty answer": ([Q, said("assistant", ""), Q], (None, [("user", "Q\nQ")], "answer")),
    "an empty last answer": ([Q, Message("assistant", ())], (None, [("user", "Q")], "answer")),
    "an empty question before": ([Message("user", ()), A, Q], (None, [("assistant", "A"), ("user", "Q")], "answer")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_arranged(name: str) -> None:
    messages, expected = SHAPES[name]
    assert shape(messages) == expected


@pytest.mark.parametrize(
    ("flags", "messages", "ending"),
    [
        ({"continue_final_message": True, "add_generation_prompt": False}, [Q, A], "continue"),
        ({"continue_final_message": False}, [Q, A], "answer"),
        ({"add_generation_prompt": True}, [Q, A], "answer"),
        ({"add_generation_prompt": True}, [Q], "answer"),
        ({"add_generation_prompt": False}, [Q], "closed"),
        ({"add_generation_prompt": False}, [Q, A], "continue"),
        ({"continue_final_message": False, "add_generation_prompt": False}, [Q, A], "closed"),
    ],
)
def test_flags_say_how_a_prompt_ends(flags: dict[str, Any], messages: list[Message], ending: str) -> None:
    assert arrange(Conversation(tuple(messages), **flags)).ending == ending


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no message of the user"),
        ([said("system", "S")], "no message of the user"),
        ([said("user", "")], "user's message is empty"),
        ([Q, A, Message("user", ())], "user's message is empty"),
        ([Message("system", (ImagePart(b""),)), Q], "only stand in a user message"),
        ([Q, Message("assistant", (ImagePart(b""),)), Q], "only stand in a user message"),
        (Conversation((Q,), continue_final_message=True), "needs a last message of the assistant"),
        (Conversation((Q, A), True, True), "not both"),
    ],
)
def test_conversations_that_cannot_be_rendered(messages: Sequence[Message], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        arrange(messages)
