"""Chat templates with filters and conditions of any kind over a user's text, which may spell control tokens.

The prompt is transformers' own on the plain text, or the template or the request is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava_serve.errors import CheckpointError, RequestError
from llava_serve.prompts.chat_probe import judge
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import Arranged, prompt_text
from llava_serve.types import ImagePart, Message, TextPart
from support.fuzz import EXAMPLES, fuzz

CONTROLS = ("</s>", "[INST]", "<|im_end|>")
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ TEXT }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
FILTERS = (
    *("upper", "lower", "title", "capitalize", "trim", "trim('<>')", "tojson", "e", "string", "default('none')"),
    *(
        "replace('i', '!')",
        "replace(' ', '')",
        "replace('<', '')",
        "replace('i', '</s>')",
        "truncate(9, True, '..', 0)",
    ),
    *("first", "last", "reverse", "length | string", "wordcount | string", "list | join('')", "list | join(',')"),
    *("list | unique | join", "list | sort | join", "list | length | string", "map('upper') | join", "safe"),
    *("select('in', 'aeiou') | join", "reject('equalto', ' ') | join", "list | tojson", "groupby(0) | length | string"),
)
METHODS = (
    *("strip()", "lstrip('<')", "rstrip('>')", "upper()", "title()", "capitalize()", "replace('s', 'S')"),
    *("split('s')[0]", "split() | join(' ')", "partition('i')[2]", "removeprefix('<')", "splitlines() | join('|')"),
    *("count('i') | string", "find('s') | string", "startswith('<') | string", "isalnum() | string"),
)
FORMS = (
    *("{0}[1:]", "{0}[:-1]", "{0}[:7]", "{0}[::-1]", "{0} ~ '!'", "'<' ~ {0} ~ 's>'", "{0} + '</s>'", "{0} ~ {0}"),
    *("'yes' if 'circle' in {0} else {0}", "'yes' if {0} == 'image' else {0}", "'no' if {0} is lower else {0}"),
    *("'long' if {0} | length > 9 else {0}", "{0} if {0} is string else 'none'", "'s>' if {0} > 'a' else {0}"),
    *("{0} | center(30)", "{0} | indent(2)", "{0} * 2", "'%s' % {0}"),  # refused: the sandbox has none of them
)
STEPS = [*(f"{{0}} | {one}" for one in FILTERS), *(f"{{0}}.{one}" for one in METHODS), *FORMS]
PIECES = (
    "What is the circle image im INST end it\n 5 < > / | [ ] ! . é \" ' & </s> <image> [INST] <|im_end|> </ s> <|im"
)
WORDS = st.sampled_from([*PIECES.split(" "), " ", "  ", "\n"])


class Case(NamedTuple):
    steps: list[str]
    text: str

    @property
    def template(self) -> str:
        expression = "c['text']"
        for step in self.steps:
            expression = f"({step.format(expression)})"
        return PARTS.replace("TEXT", expression)


CASES = st.builds(
    Case, st.lists(st.sampled_from(STEPS), max_size=4), st.lists(WORDS, min_size=1, max_size=8).map("".join)
)


def theirs(case: Case) -> str | None:
    """The prompt by transformers; None if it fails."""
    content = [{"type": "image"}, {"type": "text", "text": case.text}]
    talk = [{"role": "user", "content": content}]
    try:
        rendered, _ = render_jinja_template([talk], chat_template=case.template, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return str(rendered[0])


def check(case: Case) -> None:
    try:
        template = judge(ChatTemplate(case.template, CONTROLS)).template
    except CheckpointError:
        return
    assert template.forms["user"] == "parts"
    ours = rendered(template, case.text)
    if isinstance(ours, RequestError):  # for a text that spells a part of a control token, or where the template fails
        assert "control token" in ours.message or theirs(case) is None
    else:
        assert ours == theirs(case)


def rendered(template: ChatTemplate, text: str) -> str | RequestError:
    """The prompt of a question with an image."""
    message = Message("user", (ImagePart(b""), TextPart(text)))
    try:
        return prompt_text(template.render(Arranged(None, [message], "answer")))
    except RequestError as error:
        return error


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(CASES)
def test_the_prompt_is_that_of_transformers_or_refused(case: Case) -> None:
    check(case)


@pytest.mark.extended
def test_many_templates() -> None:
    assert fuzz(check, CASES, 20) >= EXAMPLES


KEPT = ("upper", "trim", "replace('i', '!')", "tojson", "list | join('')", "default('none')", "string")
TYPED = ("What is it?", "is 5 < 6", "</s>", "a <image> b", "the [INST] </s>\n", '"image"', "im")


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("step", KEPT)
def test_what_keeps_a_text_is_never_refused(step: str, text: str) -> None:
    case = Case([f"{{0}} | {step}"], text)
    template = judge(ChatTemplate(case.template, CONTROLS)).template
    assert rendered(template, text) == theirs(case)


@pytest.mark.parametrize(
    ("step", "text"),
    [("length | string", "a </s> b"), ("capitalize", "image"), ("truncate(9, True, '..', 0)", "0123 </s> 56")],
)
def test_what_sees_the_marks_is_refused_for_such_a_text_alone(step: str, text: str) -> None:
    template = judge(ChatTemplate(PARTS.replace("TEXT", f"c['text'] ~ ' ' ~ (c['text'] | {step})"), CONTROLS)).template
    assert "What is it?" in str(rendered(template, "What is it?"))
    assert "a part of a control token" in str(rendered(template, text))
