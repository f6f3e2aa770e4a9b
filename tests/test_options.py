"""Options of the library: a wrong value gives a sentence of ours that names the option, never a library's text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llava_serve import LLM, AsyncLLM
from llava_serve.app_options import AppOptions, Probe
from llava_serve.batch.job import BatchJob
from llava_serve.config import (
    ApiOptions,
    EngineOptions,
    ImageOptions,
    LinkHost,
    ModelOptions,
    RoutingOptions,
    resolve_model_options,
)
from llava_serve.errors import LlavaServeError, RequestError
from llava_serve.options import Options

GIVEN: dict[type[Options], dict[str, Any]] = {
    AppOptions: {},
    ApiOptions: {},
    BatchJob: {"input": "in", "output": "out"},
    EngineOptions: {},
    ImageOptions: {},
    LinkHost: {"host": "images.example.org"},
    ModelOptions: {},
    Probe: {"image": "demo.png", "question": "What?", "expect": "red"},
    RoutingOptions: {},
}
"""By class: what has no default."""
VALUES: tuple[Any, ...] = (
    *("", "many", "\ud800", b"x", -1, 0, 1.5, 10**400, math.nan, math.inf, None, True),
    *([], [1], ["x"], {}, {"x": 1}, [{"host": 1}], [{"host": "a.b", "networks": ["x"]}], object(), Path("/x")),
)
FIELDS = [(kind, name) for kind in GIVEN for name in kind.model_fields]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_every_option_takes_a_value_or_says_what_it_must_be(kind: type[Options], name: str) -> None:
    errors = [error for value in VALUES if (error := fault(kind, {name: value})) is not None]
    assert errors, "no value is wrong"
    for error in errors:
        assert error.message.startswith(name)
        assert str(error.param).startswith(name)
        assert error.message.endswith(".")
        for foreign in ("Input should", "validation", "Value error", "not allowed", "literal", "pydantic"):
            assert foreign not in error.message


def fault(kind: type[Options], values: dict[str, Any]) -> RequestError | None:
    """What is wrong with options; None if they are made."""
    try:
        kind(**{**GIVEN[kind], **values})
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize("kind", GIVEN)
def test_an_unknown_option_is_named(kind: type[Options]) -> None:
    with pytest.raises(RequestError, match=r"^colour is unknown\.$"):
        kind(**GIVEN[kind], colour="red")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a dtype": ({"dtype": "float31"}, "dtype must be one of 'auto', 'float32', 'float64', 'bfloat16' or 'float16'."),
    "bits": ({"quantization": "2bit"}, "quantization must be one of '8bit', '4bit' or 'fp8'."),
    "an aspect": ({"image_aspect": "wide"}, "image_aspect must be one of 'pad' or 'square'."),
    "a tower": ({"vision_tower_weights": 1}, "vision_tower_weights must be one of 'checkpoint' or 'folder'."),
    "a device": ({"device": 0}, "device must be a string."),
    "a typo": ({"dtyp": "float32"}, "dtyp is unknown."),
    "an engine": ({"engine": {"max_num_seqs": 4}}, "engine must be EngineOptions(...); got a dict."),
    "images": ({"image_options": {}}, "image_options must be ImageOptions(...); got a dict."),
    "a model": ({"model": 5}, "model must be a string."),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("described", [False, True])
def test_of_both_drivers(what: str, described: bool) -> None:
    """Beside the name of a model, and beside its options."""
    keywords, sentence = WRONG[what]
    if described and what != "a model":
        keywords = {"model": ModelOptions(), **keywords}
    for driver in (LLM, AsyncLLM):
        with pytest.raises(RequestError) as refused:
            driver(**keywords)
        assert refused.value.message == sentence


def test_a_path_names_a_model_and_keywords_replace_options(tmp_path: Path) -> None:
    assert resolve_model_options(tmp_path).model == str(tmp_path)
    changed = resolve_model_options(ModelOptions(device="cpu", conv_mode="plain"), conv_mode="llava_v1")
    assert (changed.device, changed.conv_mode) == ("cpu", "llava_v1")


def test_inside_of_others_a_fault_keeps_its_place() -> None:
    with pytest.raises(RequestError, match=r"^images\.links\[1\]\.host must be a name or an address"):
        AppOptions(images={"links": ["a.b", "http://c"]})  # type: ignore[arg-type]  # as in a config


def test_the_error_is_a_value_error_and_ours() -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs must be 1 or more\.") as refused:
        EngineOptions(max_num_seqs=0)
    assert isinstance(refused.value, LlavaServeError)
