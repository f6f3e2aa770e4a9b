"""Chat templates that would take all time or all memory are refused, at load and at a request; good ones render."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_serve.checkpoints import open_checkpoint
from llava_serve.errors import CheckpointError, RequestError
from llava_serve.prompts import template_sandbox
from llava_serve.prompts.chat_probe import judge
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import Arranged
from llava_serve.prompts.template_sandbox import MAX_SOURCE, LimitedEnvironment, TemplateLimitError, render
from llava_serve.types import Message, TextPart

GROW = "{% set ns = namespace(v='x') %}{% for i in range(60) %}{% set ns.v = GROWN %}{% endfor %}{{ ns.v|length }}"
NESTED = GROW.replace("'x'", "[1]").replace("GROWN", "[ns.v, ns.v]")
LOOPS = "{% for a in L %}{% for b in L %}{% for c in L %}{% for d in L %}BODY" + "{% endfor %}" * 4
BAD = {
    "nested loops over ranges": LOOPS.replace("L", "range(99999)").replace("BODY", ""),
    "loops over a list": "{% set l = range(9999)|list %}" + LOOPS.replace("L", "l").replace("BODY", "{% set x = 1 %}"),
    "loops with output": LOOPS.replace("L", "range(99999)").replace("BODY", "x"),
    "a range of its own": "{% for a in range(10**9) %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a product": "{{ 'x' * 10**10 }}",
    "a product of constants": "{{ 'x' * 10000000000 }}",
    "a product from the left": "{{ 10000000000 * 'x' }}",
    "a product of a list": "{% set l = [1] * 10000000000 %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers": "{{ (((9 ** 999) ** 999) ** 999) }}",
    "a sum that doubles": GROW.replace("GROWN", "ns.v + ns.v"),
    "a concatenation that doubles": GROW.replace("GROWN", "ns.v ~ ns.v"),
    "a list that doubles": GROW.replace("'x'", "[1]").replace("GROWN", "ns.v + ns.v"),
    "a replacement that doubles": GROW.replace("GROWN", "ns.v.replace('x', 'xx')"),
    "a filter that doubles": GROW.replace("GROWN", "ns.v|replace('x', 'xx')"),
    "a join that doubles": GROW.replace("GROWN", "[ns.v, ns.v]|join"),
    "a joining method": GROW.replace("GROWN", "''.join([ns.v, ns.v])"),
    "nested lists as output": NESTED.replace("|length", ""),
    "nested lists as JSON": NESTED.replace("|length", "|tojson"),
    "nested lists as text": NESTED.replace("|length", "|string"),
    "nested lists concatenated": NESTED.replace("ns.v|length", "'' ~ ns.v"),
    "a width": "{{ 'x'|center(10000000000) }}",
    "a width of a method": "{{ 'x'.ljust(10000000000) }}",
    "a width in a format": "{{ '%10000000000d' % 1 }}",
    "a width in a new format": "{{ '{:10000000000}'.format(1) }}",
    "an indentation": "{{ [1]|tojson(indent=10000000000) }}",
    "a text of the library": "{{ lipsum(n=1000000) }}",
    "bytes of a number": "{{ (1).to_bytes(10000000000) }}",
    "a batch": "{{ [1]|batch(10000000000, 0)|list }}",
    "a long source": "x" * (MAX_SOURCE + 1),
    "a deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "the interpreter": "{{ ''.__class__.__mro__ }}",
}


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 1 << 20)


@pytest.mark.parametrize("what", BAD)
def test_a_template_is_ended_at_a_limit(what: str) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateError):
        render(LimitedEnvironment().compiled(BAD[what]), {})
    assert time.thread_time() - began < 3


@pytest.mark.parametrize("what", ["nested loops over ranges", "a product", "a list that doubles"])
def test_a_template_is_refused_at_load_and_a_request_cannot_hold_the_tier(what: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot render a question with an image: TemplateLimitError: A|The t"):
        judge(ChatTemplate(BAD[what]))
    shown = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    template = judge(ChatTemplate("{% if messages|length > 4 %}" + BAD[what] + "{% endif %}" + shown)).template
    turns = [Message(role, (TextPart("Hi"),)) for role in ("user", "assistant", "user", "assistant", "user")]
    assert template.render(Arranged(None, turns[2:], "answer"))  # a probe does not see all
    with pytest.raises(RequestError, match="cannot render this conversation"):
        template.render(Arranged(None, turns, "answer"))


def test_a_checkpoint_with_such_a_template_is_not_opened(folder_of: Any, tmp_path: Path) -> None:
    source = folder_of("llava-1.5-llama-hub")
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "processor_config.json").read_text()) | {"chat_template": BAD["a product"]}
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="characters or elements"):
        open_checkpoint(str(tmp_path))


GOOD = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m['role'] ~ ': ' ~ m.content }}"
    "{% if not loop.last %}, {% endif %}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content.strip().upper() }}{{ loop.revindex0 }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n % 2 == 1 }}",
    "{{ messages|map(attribute='role')|join('-') }}",
    "{{ messages|tojson }}{{ 'a' * 3 }}{{ 7 * 6 }}{{ 2 ** 9 }}{{ 7 % 4 }}",
    "{{ (messages|selectattr('role', 'equalto', 'user')|list)[0].content|replace('e', '3') }}{{ gone|default('x') }}",
    "{% macro show(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages[1:] %}{{ show(m) }}{% endfor %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}{{ [1, 'a', none] }}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{% for m in nothing %}{% endfor %}",
    "{% for m in messages %}{{ m.content.replace('e', '3') }}{{ '-'.join([m.role, 'x']) }}{% endfor %}",
    "{{ 'a,b'.split(',')|last }}{{ 'abc'.replace('b', 'x', 1) }}{{ ','.join(['a', 'b']) }}{{ 1.5 * 2 }}{{ 'a' + 'b' }}",
]


@pytest.mark.parametrize("source", GOOD)
def test_good_templates_render_as_in_transformers_sandbox(source: str) -> None:
    messages = [{"role": "user", "content": " Hello there "}, {"role": "assistant", "content": "<Hi> & 'so'"}]
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # as transformers has it
    expected = environment.from_string(source).render(messages=messages)
    assert render(LimitedEnvironment().compiled(source), {"messages": messages}) == expected
    assert expected


def test_the_time_is_the_renderings_own() -> None:
    def wait() -> str:
        time.sleep(0.2)
        return "x"

    template = LimitedEnvironment().compiled("{% for a in range(3) %}{{ wait() }}{% endfor %}")
    assert render(template, {"wait": wait}) == "xxx"
    with pytest.raises(TemplateLimitError, match="runs for more than"):
        render(LimitedEnvironment().compiled(BAD["nested loops over ranges"]), {})
    assert render(template, {"wait": lambda: "y"}) == "yyy"
