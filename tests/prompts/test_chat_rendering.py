"""What a chat template makes of one conversation: spans, and where an answer goes on."""

from __future__ import annotations

import pytest

from llava_serve.errors import RequestError
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import (
    Arranged,
    Control,
    ImageSlot,
    Text,
    prompt_text,
)
from llava_serve.types import ImagePart, Message, Role, TextPart

PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text']TEXT }}{% endif %}{% endfor %}</s>{% endfor %}assistant:"
)

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def said(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


Q, A = said("user", "Q"), said("assistant", "A")


def question(text: str) -> Arranged:
    return Arranged(None, [Message("user", (ImagePart(b""), TextPart(text)))], "answer")


def test_a_chat_template_of_transformers() -> None:
    turns = [Message("user", (ImagePart(b""), TextPart("  what </s> <image>? ")))]
    spans = ChatTemplate(TEMPLATE, ("</s>",)).render(Arranged(None, turns, "answer"))
    assert spans == [Text("USER: "), ImageSlot(), Text("\nwhat </s> <image>? ASSISTANT:")]


def test_a_chat_template_cannot_reach_out_of_its_sandbox() -> None:
    asked = Arranged(None, [Q], "answer")
    with pytest.raises(RequestError, match="cannot render"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render(asked)
    with pytest.raises(RequestError, match="refuses the conversation: only users"):
        ChatTemplate("{{ raise_exception('only users') }}").render(asked)


@pytest.mark.parametrize("text", ["The <image> is", "The circle is "])
def test_an_answer_that_has_begun_stays_open_in_a_chat_template(text: str) -> None:
    asked = Arranged(None, [Q, said("assistant", text)], "continue")
    assert prompt_text(ChatTemplate(TEMPLATE, ("</s>",)).render(asked)) == f"USER: Q ASSISTANT: {text}"


def test_a_chat_template_that_hides_the_last_message_cannot_continue_it() -> None:
    hiding = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(RequestError, match="does not show the last message"):
        ChatTemplate(hiding).render(Arranged(None, [Q, A], "continue"))


def test_a_text_that_is_cut_inside_a_token_is_refused() -> None:
    cutting = PARTS.replace("TEXT", "[:12]")
    template = ChatTemplate(cutting, ("</s>",))
    shown = prompt_text(template.render(question("0123456789abcdef")))
    assert shown.count("0123456789ab") == 1
    with pytest.raises(RequestError, match="a part of a control token"):
        template.render(question("0123456789</s>"))
    reversing = ChatTemplate(PARTS.replace("TEXT", "[::-1]"), ("</s>",))
    with pytest.raises(RequestError, match="cuts a text"):
        reversing.render(question("0123456789</s>"))


def test_texts_may_hold_the_characters_of_the_marks() -> None:
    template = ChatTemplate(PARTS.replace("TEXT", ""), ("</s>",))
    text = "\U000f0000</s>\U000f0001 \U000f0002"
    spans = template.render(question(text))
    assert text in prompt_text(spans)
    assert [span for span in spans if isinstance(span, Control)] == [Control("</s>")]
