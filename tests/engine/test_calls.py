"""`generate`, `chat` and `stream` are the same on `LLM` and `AsyncLLM`, and accept inputs in all their forms."""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llava_serve
from llava_serve import AsyncLLM, Conversation, EngineOptions, ImageOptions, ModelOptions, SamplingParams
from llava_serve.errors import DeadlineExceededError, LlavaServeError, RequestError
from llava_serve.llm import LLM
from llava_serve.openai_messages import read_messages
from llava_serve.results import GenerationResult
from llava_serve.types import PROMPT_VERSION, Chunk
from support.api_server import BODY, PATH, PacedBackend, app_over, error_of
from support.paths import GOLDEN

IMAGES = [str(GOLDEN / "images" / name) for name in ("landscape.png", "portrait.png")]
MODEL = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
QUERY = "What is this?"
OPTIONS = EngineOptions(num_threads=1, kv_cache_bytes=1 << 22)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("builtin", {"dtype": "float31"}, "dtype must be one of 'auto', 'float32'"),
        (ModelOptions(), {"quantization": "2bit"}, "quantization must be one of '8bit', '4bit' or 'fp8'."),
        (Path("builtin"), {"colour": 1}, "colour is unknown."),
        (7, {}, "model must be a string."),
    ],
)
@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_a_wrong_option_of_the_model_is_a_sentence(kind: Any, model: Any, options: Any, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        kind(model, **options)
    assert str(caught.value).startswith(sentence)
    assert caught.value.param == sentence.split()[0]


def messages(image: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "image", "image": image}, {"type": "text", "text": QUERY}]}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(Path(MODEL), device="cpu", dtype="float64", engine=OPTIONS)


@pytest.fixture(scope="module")
def async_llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(MODEL, OPTIONS, device="cpu", dtype="float64")
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def answer(llm: LLM) -> GenerationResult:
    return llm.generate(QUERY, [IMAGES[0]], GREEDY)


def joined(chunks: list[Chunk]) -> tuple[str, tuple[int, ...]]:
    return "".join(chunk.text for chunk in chunks), tuple(
        itertools.chain.from_iterable(chunk.token_ids for chunk in chunks)
    )


@pytest.mark.parametrize("images", [IMAGES[0], Path(IMAGES[0]), Path(IMAGES[0]).read_bytes(), (IMAGES[0],)])
def test_one_image_needs_no_list(llm: LLM, answer: GenerationResult, images: Any) -> None:
    assert llm.generate(QUERY, images, GREEDY).token_ids == answer.token_ids
    assert joined(list(llm.stream(QUERY, images, GREEDY))) == (answer.text, answer.token_ids)


def test_a_list_of_prompts_has_one_entry_of_images_each(llm: LLM) -> None:
    queries = [QUERY, QUERY, QUERY]
    flat = llm.generate(queries, [IMAGES[0], [IMAGES[1]], None], GREEDY)
    nested = llm.generate(queries, [[IMAGES[0]], [IMAGES[1]], []], GREEDY)
    assert [result.token_ids for result in flat] == [result.token_ids for result in nested]
    assert [result.prompt.count("<image>") for result in flat] == [1, 1, 0]


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    lengths = [2, 5]
    each = [replace(GREEDY, max_new_tokens=length, ignore_eos=True) for length in lengths]
    assert [len(result.token_ids) for result in llm.generate([QUERY] * 2, sampling=each)] == lengths
    talk = [{"role": "user", "content": QUERY}]
    assert [len(result.token_ids) for result in llm.chat([talk, talk], each)] == lengths


@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({"images": [IMAGES[0]]}, "images", ("list of 2 prompts", "got a list of 1")),
        ({"images": IMAGES[0]}, "images", ("list of 2 prompts", "one picture")),
        ({"sampling": [GREEDY]}, "sampling", ("one each", "got 1 for 2")),
    ],
)
def test_lists_of_different_length_are_refused(
    llm: LLM, fields: dict[str, Any], param: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(RequestError) as refusal:
        llm.generate([QUERY, QUERY], **fields)
    assert refusal.value.param == param
    assert all(part in refusal.value.message for part in parts)


WRONG: list[tuple[str, Any, dict[str, Any], str]] = [
    ("generate", 7, {}, "query"),
    ("generate", QUERY, {"sampling": [GREEDY]}, "sampling"),
    ("generate", QUERY, {"sampling": {"temperature": 0}}, "sampling"),
    ("generate", QUERY, {"timeout": "long"}, "timeout"),
    ("generate", QUERY, {"priority": "high"}, "priority"),
    ("chat", "Hello", {}, "messages"),
    ("chat", ["Hello"], {}, "messages"),
]


@pytest.mark.parametrize(("method", "asked", "fields", "param"), WRONG)
async def test_what_is_of_another_kind_is_refused_by_name(
    llm: LLM, async_llm: AsyncLLM, method: str, asked: Any, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        getattr(llm, method)(asked, **fields)
    assert refusal.value.param == param
    with pytest.raises(RequestError) as refusal:
        await getattr(async_llm, method)(asked, **fields)
    assert refusal.value.param == param


async def test_no_option_is_ignored(llm: LLM, async_llm: AsyncLLM) -> None:
    unknown: Any = {"temperature": 0}
    for call in (llm.generate, llm.stream):
        with pytest.raises(TypeError, match="no option 'temperature'; there are conv_mode, timeout, priority"):
            call(QUERY, **unknown)
    with pytest.raises(TypeError, match="no option 'temperature'"):
        await async_llm.generate(QUERY, **unknown)
    with pytest.raises(RequestError, match="a call each"):
        await async_llm.generate([QUERY, QUERY])  # type: ignore[call-overload]


@pytest.mark.parametrize("wrong", [{"priority": "high"}, {"deadline": "soon"}])
def test_a_prepared_prompt_cannot_bring_the_engine_what_it_cannot_compare(llm: LLM, wrong: Any) -> None:
    prepared = llm.processor.prepare_query(QUERY)
    with pytest.raises(RequestError) as refusal:
        next(llm.generate_prepared(prepared, GREEDY, **wrong))
    assert [refusal.value.param] == list(wrong)
    assert llm.run([prepared], GREEDY)[0].token_ids


def test_max_tokens_is_an_alias(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=3)
    assert sampling == SamplingParams(temperature=0, max_new_tokens=3)
    assert len(llm.generate(QUERY, sampling=sampling).token_ids) == 3
    with pytest.raises(RequestError, match="max_new_tokens"):
        SamplingParams(max_tokens=0)


async def test_async_calls_answer_the_same(llm: LLM, async_llm: AsyncLLM, answer: GenerationResult) -> None:
    assert (await async_llm.generate(QUERY, IMAGES[0], GREEDY)).outputs == answer.outputs
    async with aclosing(async_llm.stream(QUERY, IMAGES[0], GREEDY)) as chunks:
        assert joined([chunk async for chunk in chunks]) == (answer.text, answer.token_ids)
    talk = messages(IMAGES[0])
    result = llm.chat(talk, GREEDY)
    assert (await async_llm.chat(talk, GREEDY)).token_ids == result.token_ids
    async with aclosing(async_llm.stream(talk, GREEDY)) as chunks:
        assert joined([chunk async for chunk in chunks]) == (result.text, result.token_ids)
    assert joined(list(llm.stream(talk, sampling=GREEDY))) == (result.text, result.token_ids)


async def test_deprecated_forms_work_with_a_warning(llm: LLM, async_llm: AsyncLLM, answer: GenerationResult) -> None:
    prepared = llm.processor.prepare_query(QUERY, [IMAGES[0]])
    with pytest.warns(DeprecationWarning, match="generate_prepared"):
        chunks = async_llm.generate(prepared, GREEDY, request_id="old", deadline=time.time() + 60)
    assert joined([chunk async for chunk in chunks])[1] == answer.token_ids
    with pytest.warns(DeprecationWarning, match="generate_prepared"):
        assert joined(list(llm.stream(prepared, GREEDY)))[1] == answer.token_ids
    with pytest.warns(DeprecationWarning, match="image_options"):
        small = LLM(MODEL, device="cpu", engine=OPTIONS, images=ImageOptions(max_per_request=0))
    with pytest.raises(RequestError, match="at most 0"):
        small.generate(QUERY, IMAGES[0])


@pytest.mark.parametrize("seconds", [1e-9, 0.05])
async def test_a_timeout_ends_an_answer(llm: LLM, async_llm: AsyncLLM, seconds: float) -> None:
    endless = SamplingParams(temperature=0, max_new_tokens=1500, ignore_eos=True)
    with pytest.raises(DeadlineExceededError):
        llm.generate(QUERY, IMAGES[0], endless, timeout=seconds)
    with pytest.raises(DeadlineExceededError):
        llm.generate([QUERY] * 3, sampling=endless, timeout=seconds)
    with pytest.raises(DeadlineExceededError):
        list(llm.stream(QUERY, IMAGES[0], endless, timeout=seconds))
    with pytest.raises(DeadlineExceededError):
        await async_llm.chat(messages(IMAGES[0]), endless, timeout=seconds)
    assert not llm.engine.has_work


def test_a_smaller_priority_is_served_earlier() -> None:
    narrow = LLM(MODEL, device="cpu", engine=OPTIONS.model_copy(update={"max_num_seqs": 1}))
    ended: list[int] = []
    requests = {}
    for priority in (5, 0, 3):
        prepared = narrow.processor.prepare_query(QUERY)
        request = narrow.engine.validator.accept(f"{priority}", prepared, GREEDY, priority=priority)
        requests[request.request_id] = priority
        narrow.engine.add(request)
    while narrow.engine.has_work:
        ended += [requests[output.request_id] for output in narrow.engine.step() if output.finish_reason]
    assert ended == [0, 3, 5]


def test_a_request_has_a_priority_within_the_servers_range() -> None:
    backend = PacedBackend()
    with app_over(backend, priority_range=(-1, 7)) as web:
        for priority in (-1, None, 7):
            assert web.post(PATH, json=BODY | {"priority": priority}).status_code == 200
        refused = web.post(PATH, json=BODY | {"priority": 8})
    assert backend.priorities == [-1, 0, 7]
    assert refused.status_code == 400
    assert error_of(refused)["message"] == "priority must be between -1 and 7 on this server."
    assert error_of(refused)["param"] == "priority"


def test_a_prompt_of_another_release_is_refused_by_name(llm: LLM) -> None:
    prepared = llm.processor.prepare_query(QUERY, [IMAGES[0]])
    state = prepared.__getstate__()
    del state["stop"]  # a release that had no such field
    old = prepared.__class__.__new__(prepared.__class__)
    old.__setstate__(state | {"version": 1, "grid": 7})
    with pytest.raises(LlavaServeError, match=f"layout 1 .* layout {PROMPT_VERSION}"):
        llm.run([pickle.loads(pickle.dumps(prepared)), old])
    assert llm.run([pickle.loads(pickle.dumps(prepared))], GREEDY)[0].token_ids


def test_the_library_reads_what_the_server_reads(llm: LLM) -> None:
    result = llm.chat([{"role": "developer", "content": "Be brief."}, *messages(IMAGES[0])], GREEDY)
    assert result.prompt.startswith("Be brief.")
    by_url = [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGES[0]}]}]
    assert llm.chat(by_url, GREEDY).prompt.count("<image>") == 1
    begun = [*messages(IMAGES[0]), {"role": "assistant", "content": "It is"}]
    assert llm.chat(begun, GREEDY).prompt.endswith("ASSISTANT: It is")
    reopened = Conversation(read_messages(begun, lambda path: Path(path).read_bytes()), add_generation_prompt=True)
    assert llm.chat(reopened, GREEDY).prompt.endswith("ASSISTANT: It is</s>ASSISTANT:")
    for bad, param in (
        ({"role": "user", "content": "Hi", "tool_calls": [1]}, "messages[0].tool_calls[0]"),
        ({"role": "robot", "content": "Hi"}, "messages[0].role"),
        (messages(IMAGES[0], "assistant")[0], "messages[0]"),
    ):
        with pytest.raises(RequestError) as refusal:
            llm.chat([bad])
        assert refusal.value.param == param
    with pytest.raises(RequestError, match="stand in its messages"):
        llm.stream(messages(IMAGES[0]), IMAGES[1])


def test_the_public_names_are_exported() -> None:
    for name in llava_serve.__all__:
        assert getattr(llava_serve, name).__name__ == name
    root = llava_serve.LlavaServeError
    values = vars(llava_serve.errors).items()
    errors = {name for name, value in values if isinstance(value, type) and issubclass(value, root)}
    assert errors <= set(llava_serve.__all__)
