"""Structured output over models that write at random: what has ended has the form, and the form alone changes."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import threading
from collections import Counter
from typing import Any

import jsonschema
import pytest
import torch

from llava_serve.async_llm import AsyncLLM
from llava_serve.config import EngineOptions
from llava_serve.engine import grammar
from llava_serve.engine.executor import sampler
from llava_serve.engine.executor.sampling_step import PendingStep
from llava_serve.engine.executor.step_result import StepResult
from llava_serve.engine.failures import StepFailures
from llava_serve.engine.grammar import GrammarCompiler, Matcher
from llava_serve.engine.scheduler import Scheduler
from llava_serve.engine.sequence import EngineRequest, Extent, Sequence, SequenceGroup
from llava_serve.errors import LlavaServeError
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams
from llava_serve.structured_output import StructuredOutput
from llava_serve.types import Conversation, Message, TextPart
from support.demo import DEMO_IMAGE
from support.paths import CHECKPOINTS
from support.tiny_engine import engine, outcomes, prompt

NAMES = ("llava-v1.5-tiny", "llava-mpt-tiny", "llava-v1.6-34b-tiny")
"""A tokenizer of sentencepiece, a byte-level one, and one with control tokens of its own."""
BYTES = 3 + 256
"""Leading tokens of sentencepiece's vocabulary: three control tokens, and the bytes."""
COLOUR = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"]} | {
    "additionalProperties": False
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-zé]{1,3}$"}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "leaf": {"type": "boolean"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["leaf", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@functools.cache
def llm(name: str) -> LLM:
    where = name if name == "builtin" else str(CHECKPOINTS / name)
    return LLM(where, device="cpu", dtype="float32", engine=EngineOptions(num_threads=1, kv_cache_bytes=64 << 20))


def byte(letter: str) -> int:
    """The token of a byte, in a vocabulary of sentencepiece."""
    return 3 + ord(letter)


def sampling(form: StructuredOutput, **fields: Any) -> SamplingParams:
    return SamplingParams(structured=form, **{"max_new_tokens": 150, **fields})


@pytest.mark.parametrize("schema", [COLOUR, PERSON, TREE], ids=["colour", "person", "tree"])
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_has_ended_keeps_to_its_schema(name: str, schema: dict[str, Any]) -> None:
    form = StructuredOutput(json=schema)
    each = [sampling(form, seed=seed, temperature=1.5, n=2) for seed in range(4)] + [sampling(form, temperature=0)]
    results = llm(name).generate(["Who?"] * len(each), sampling=each)
    answers = [output for result in results for output in result.outputs]
    ended = [answer.text for answer in answers if answer.finish_reason == "stop"]
    for text in ended:
        jsonschema.validate(json.loads(text), schema)
    assert len(ended) >= len(answers) / 2
    assert all(len(one.token_ids) == 150 for one in answers if one.finish_reason == "length")


@pytest.mark.parametrize("name", NAMES)
def test_other_forms(name: str) -> None:
    options = ("red", "dark red", "é/\"'\\", "a\nb")
    forms = {
        r"(?s:red|dark red|é/\"'\\|a\nb)": StructuredOutput(choice=options),
        r"[0-9]{3}-[a-z]{2,4}": StructuredOutput(regex=r"[0-9]{3}-[a-z]{2,4}"),
        r"(it is )(not )?[a-c]": StructuredOutput(grammar='start: "it is " neg? /[a-c]/\nneg: "not "'),
        r"x+y": StructuredOutput(grammar='root ::= "x"+ end\nend ::= "y"'),
    }
    each = [sampling(form, seed=seed, temperature=2) for form in forms.values() for seed in range(5)]
    results = llm(name).generate(["What?"] * len(each), sampling=each)
    for at, result in enumerate(results):
        if result.finish_reason == "stop":
            assert re.fullmatch(list(forms)[at // 5], result.text), result.text
    assert sum(result.finish_reason == "stop" for result in results) > 15
    [anything] = llm(name).generate(["Who?"], sampling=sampling(StructuredOutput(json_object=True), temperature=0))
    assert anything.finish_reason == "length" or isinstance(json.loads(anything.text), dict)


def test_an_answer_that_is_cut_says_so() -> None:
    result = llm("builtin").generate("Who?", sampling=sampling(StructuredOutput(regex="[a-z]{40}"), max_new_tokens=3))
    assert result.finish_reason == "length"
    chosen = sampling(StructuredOutput(choice=("red circle",)), stop=("d c",))
    result = llm("builtin").generate("Who?", sampling=chosen)
    assert (result.text, result.finish_reason) == ("re", "stop")


def test_the_model_chooses_within_the_form() -> None:
    asked, choices = "What colour is the circle?", StructuredOutput(choice=("green", "blue", "red"))
    result = llm("builtin").generate(asked, [str(DEMO_IMAGE)], sampling(choices, temperature=0, logprobs=2))
    assert (result.text, result.finish_reason) == ("red", "stop")
    assert result.logprobs is not None
    assert [len(entry.top) for entry in result.logprobs] == [2] * len(result.token_ids)


def test_the_form_is_that_of_the_generated_part() -> None:
    messages = (
        Message("user", (TextPart("Who?"),)),
        Message("assistant", (TextPart('{"colour":'),)),
    )
    form = StructuredOutput(regex=' "(red|green)"}')
    result = llm("builtin").chat(Conversation(messages), sampling(form, temperature=0))
    assert json.loads('{"colour":' + result.text)["colour"] in ("red", "green")
    assert result.text.startswith(" ")


def test_preemption_does_not_advance_a_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = llm("llava-v1.5-tiny")
    prompts = [subject.processor.prepare_query(f"Who? {at}", []) for at in range(6)]
    asked = [sampling(StructuredOutput(json=PERSON), seed=at, max_new_tokens=60) for at in range(5)]
    requests = list(zip(prompts, [*asked, SamplingParams(seed=9, max_new_tokens=60)], strict=True))
    model = subject.engine.model
    alone = [outcomes(engine(model, blocks=300), request)[0] for request in requests]
    preempted: list[SequenceGroup] = []
    preempt = Scheduler._preempt

    def counted(self: Scheduler, group: SequenceGroup) -> None:
        preempted.append(group)
        preempt(self, group)

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    assert outcomes(engine(model, blocks=40, block_size=4), *requests) == alone
    assert preempted


@pytest.mark.parametrize("part", ["allowed", "advance"])
def test_a_failure_of_a_matcher_fails_its_request_only(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    subject = llm("llava-v1.5-tiny")
    one = subject.processor.prepare_query("Who?", [])
    form = StructuredOutput(regex="[a-z]{20}")
    requests = [(one, SamplingParams(seed=at, max_new_tokens=20)) for at in range(3)]
    asked = [(one, sampling(form, seed=at)) for at in range(2)]
    free = outcomes(engine(subject.engine.model), *requests)
    failing: list[Matcher] = []
    works = getattr(Matcher, part)

    def fails(self: Matcher, *token: int) -> Any:
        if not failing:
            failing.append(self)
        if self is failing[0]:
            raise ValueError("/a/path")
        return works(self, *token)

    monkeypatch.setattr(Matcher, part, fails)
    first, second, *others = outcomes(engine(subject.engine.model), *asked, *requests)
    assert isinstance(first, LlavaServeError)
    assert "path" not in first.message
    assert isinstance(second, list)
    assert others == free


def test_a_greedy_answer_is_that_of_a_mask_at_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = llm("llava-v1.5-tiny")
    forms = [StructuredOutput(json=PERSON), StructuredOutput(regex="[a-z ]{3,20}[.]"), StructuredOutput(json=TREE)]
    asked = [sampling(form, temperature=0, max_new_tokens=60) for form in forms]
    questions = ["Who?", "What is it?", "Why?"]
    quick = subject.generate(questions, sampling=asked)
    monkeypatch.setattr(sampler, "_truncates", lambda _: True)
    masked = subject.generate(questions, sampling=asked)
    assert [one.token_ids for one in quick] == [one.token_ids for one in masked]
    assert all(one.text for one in quick)


def test_tokens_that_are_allowed_take_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Matcher] = []
    allowed = Matcher.allowed

    def counted(self: Matcher) -> Any:
        masks.append(self)
        return allowed(self)

    monkeypatch.setattr(Matcher, "allowed", counted)
    form = StructuredOutput(regex="The circle is [a-z]+.")
    for fields in ({"temperature": 0}, {"temperature": 0.1, "seed": 3}):
        result = llm("builtin").generate("What colour is the circle?", [str(DEMO_IMAGE)], sampling(form, **fields))
        assert result.text == "The circle is red."
        assert not masks
    llm("builtin").generate("What colour is the circle?", [str(DEMO_IMAGE)], sampling(form, top_p=0.5))
    assert len(masks) == len(result.token_ids)


@pytest.mark.parametrize(
    ("fields", "left"), [({}, "ace"), ({"top_p": 0.8}, "ac"), ({"min_p": 0.2}, "ac"), ({"temperature": 0.5}, "ace")]
)
def test_sampled_tokens_have_the_distribution_that_the_grammar_leaves(fields: dict[str, Any], left: str) -> None:
    """Of 4,000 tokens with a seed each, over the vocabulary's bytes: three letters of six are allowed."""
    count, logit_of = 4000, {"a": 1.0, "b": 2.0, "c": 0.5, "d": 0.0, "e": -1.0, "f": 1.5}
    grammar = GrammarCompiler(llm("llava-v1.5-tiny").spec.tokenizer, BYTES).compile(StructuredOutput(regex="[ace]x"))
    logits = torch.full((1, BYTES), -30.0)
    for letter, logit in logit_of.items():
        logits[0, byte(letter)] = logit
    asked = SamplingParams(structured=StructuredOutput(regex="[ace]x"), **fields)
    requests = [
        EngineRequest(str(seed), prompt([1]), asked, None, 0, seed, 9, frozenset(), frozenset(), grammar)
        for seed in range(count)
    ]
    step = StepResult(logits.expand(count, -1), [], torch.ones(0, dtype=torch.bool), [], StepFailures(), 0.0)
    sequences = [Sequence(one, 0, [1], extent=Extent(0, 1)) for one in requests]
    sampled = PendingStep(step, sequences, {}, torch.float32).read()
    found = Counter(token.token_id for _, token in sampled.tokens)
    weights = {letter: math.exp(logit_of[letter] / asked.temperature) for letter in left}
    assert found.total() == count
    assert found.keys() == {byte(letter) for letter in left}
    for letter, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(found[byte(letter)] / count - share) < 4 * math.sqrt(share * (1 - share) / count)


async def test_compiling_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    compiled = grammar._compile

    def slow(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return compiled(*args)

    monkeypatch.setattr(grammar, "_compile", slow)
    subject = AsyncLLM("builtin", EngineOptions(num_threads=1, kv_cache_bytes=64 << 20))
    try:
        asked = sampling(StructuredOutput(choice=("yes", "no")))
        waiting = asyncio.create_task(subject.generate("Who?", sampling=asked))
        assert await asyncio.to_thread(begun.wait, 60)
        free = await subject.generate("Who?", sampling=SamplingParams(max_new_tokens=5))
        assert free.token_ids
        assert not waiting.done()
        go_on.set()
        assert (await waiting).text in ("yes", "no")
        assert (await subject.generate("Who?", sampling=asked)).text in ("yes", "no")
    finally:
        go_on.set()
        subject.close()
