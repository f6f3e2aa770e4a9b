"""Forms of strangers are compiled in a child process first: one that would take a core for hours ends that process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from llava_serve.async_llm import AsyncLLM
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions
from llava_serve.engine.grammar_trial import GrammarTrial
from llava_serve.errors import RequestError
from llava_serve.sampling_params import SamplingParams
from llava_serve.structured_output import StructuredOutput
from testbed.hostile_inputs import INTERSECTION

CHOICE = StructuredOutput(choice=("yes", "no"))
ENDLESS = {
    "a multiple": StructuredOutput(json={"type": "integer", "multipleOf": 999_983}),
    "a multiple within": StructuredOutput(
        json={"type": "array", "items": {"type": "integer", "multipleOf": 1_999_993}}
    ),
    "an intersection": StructuredOutput(grammar="start: A\nA: " + INTERSECTION),
    "white space": StructuredOutput(json={"type": "object", "x-guidance": {"whitespace_pattern": "x?" * 30_000}}),
}
"""The library has no limit that ends these in a minute."""
EXTENDED = pytest.mark.extended


@pytest.fixture(scope="module")
def trial() -> Iterator[GrammarTrial]:
    made = GrammarTrial(open_checkpoint("builtin").tokenizer, 640, seconds=0.3)
    yield made
    made.close()


def process_of(trial: GrammarTrial) -> int:
    assert trial._child is not None
    return trial._child._process.pid


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "a multiple" else EXTENDED) for name in ENDLESS]
)
def test_an_endless_form_is_refused_and_the_next_one_is_not(trial: GrammarTrial, name: str) -> None:
    with pytest.raises(RequestError, match="cannot be followed: it is too complex"):
        trial.check(ENDLESS[name], False)
    trial.check(CHOICE, False)


def test_a_fault_is_reported_as_the_compiler_does_and_the_process_is_used_again(trial: GrammarTrial) -> None:
    trial.check(CHOICE, False)
    first = process_of(trial)
    for form, sentence in (("(", "malformed"), ("(?=a)b", "look-around"), (r"(a)\1", "back-references")):
        with pytest.raises(RequestError, match=sentence) as refused:
            trial.check(StructuredOutput(regex=form, param="guided_regex"), True)
        assert refused.value.param == "guided_regex"
    assert process_of(trial) == first


def test_a_process_that_somebody_ended_is_replaced(trial: GrammarTrial) -> None:
    trial.check(CHOICE, False)
    os.kill(process_of(trial), signal.SIGKILL)
    assert trial._child is not None
    trial._child._process.wait()
    trial.check(CHOICE, False)


async def test_an_engine_for_servers_tries_each_form_once() -> None:
    subject = AsyncLLM("builtin", EngineOptions(num_threads=1, kv_cache_bytes=64 << 20))
    try:
        assert (await subject.generate("Who?", sampling=SamplingParams(structured=CHOICE))).text in ("yes", "no")
        child = subject._grammar_trial._child
        assert child is not None
        subject._grammar_trial.close()
        assert (await subject.generate("Who?", sampling=SamplingParams(structured=CHOICE))).text in ("yes", "no")
        assert subject._grammar_trial._child is None  # it was compiled already
    finally:
        subject.close()
    assert not child.alive
