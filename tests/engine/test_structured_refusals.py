"""Forms of answers that are refused, each with its sentence."""

from __future__ import annotations

from typing import Any

import pytest

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions
from llava_serve.engine.grammar import GrammarCompiler
from llava_serve.errors import RequestError, UnsupportedParameterError
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams
from llava_serve.structured_output import StructuredOutput
from support.paths import CHECKPOINTS


@pytest.fixture(scope="module")
def builtin() -> LLM:
    return LLM("builtin", device="cpu", dtype="float32", engine=EngineOptions(num_threads=1, kv_cache_bytes=64 << 20))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one"),
    ({"json": {"type": "object"}, "regex": "a"}, "exactly one"),
    ({"json": "{"}, "not valid JSON"),
    ({"json": "3"}, "must be an object"),
    ({"json": {"type": "number", "minimum": float("nan")}}, "not valid JSON"),
    ({"json": '{"items":' * 101 + "{}" + "}" * 101}, "100 deep"),
    ({"json": '{"items":' * 50_000 + "{}" + "}" * 50_000}, "100 deep"),
    ({"json": {"enum": ["a" * 70_000]}}, "65,536 characters"),
    ({"json": {"allOf": [{"$ref": "#/$defs/a"}] * 257, "$defs": {"a": {}}}}, "256 references"),
    ({"json": {"type": "string", "pattern": "a?" * 3000}}, "patterns"),
    ({"json": {"not": {"type": "string"}}}, "not supported: not"),
    ({"json": {"type": "nothing"}}, "malformed"),
    ({"json": {"$ref": "http://127.0.0.1/a"}}, "must name a part of the schema itself"),
    ({"json": {"$ref": "#/$defs/none"}}, "names no part"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "nothing matches"),
    ({"json": {"type": "string", "format": "colour"}}, "'format'"),
    ({"regex": "("}, "malformed"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "back-references"),
    ({"regex": ""}, "not empty"),
    ({"regex": "a" * 5000}, "4,096 characters"),
    ({"regex": "(" * 101 + "a" + ")" * 101}, "100 deep"),
    ({"choice": ()}, "not empty"),
    ({"choice": ("a", 3)}, "list of texts"),
    ({"choice": tuple(map(str, range(2000)))}, "1,024"),
    ({"grammar": "nothing"}, "malformed"),
    ({"grammar": "start: b"}, "malformed"),
    ({"grammar": "start: a\na: a"}, "nothing that ends|too complex"),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG, ids=[f"{at}" for at in range(len(WRONG))])
def test_a_form_that_cannot_be_followed_is_refused_by_name(builtin: LLM, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as refused:
        builtin.generate("Who?", sampling=SamplingParams(structured=StructuredOutput(**fields)))
    assert refused.value.param in ("structured", *fields)
    assert len(refused.value.message) < 200
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("fields", [{"num_beams": 2, "temperature": 0}, {"ignore_eos": True}, {"min_tokens": 3}])
def test_what_does_not_go_with_a_form_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameterError, match=next(iter(fields))):
        SamplingParams(structured=StructuredOutput(regex="a"), **fields)


def test_a_form_that_the_vocabulary_cannot_write_is_refused() -> None:
    compiler = GrammarCompiler(
        open_checkpoint(str(CHECKPOINTS / "llava-v1.5-tiny")).tokenizer, 3 + 0x60
    )  # the bytes below "a"
    assert compiler.compile(StructuredOutput(choice=("ABC",))).matcher(frozenset()).allowed().any()
    with pytest.raises(RequestError, match=r"nothing that ends|no tokens for") as refused:
        compiler.compile(StructuredOutput(choice=("abc",)), continues=True).matcher(frozenset()).allowed()
    assert refused.value.param == "structured"


def test_an_error_has_the_name_of_its_own_request_also_for_a_form_that_is_kept() -> None:
    compiler = GrammarCompiler(open_checkpoint("builtin").tokenizer, 640)
    for name in ("guided_regex", "structured_outputs.regex"):
        matcher = compiler.compile(StructuredOutput(regex="a{3}", param=name)).matcher(frozenset())
        matcher._matcher.consume_tokens([0])  # not allowed: the library fails from now on
        with pytest.raises(RequestError, match="too complex to be followed") as failed:
            matcher.allowed()
        assert failed.value.param == name
