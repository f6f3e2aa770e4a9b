"""LLM on the tiny checkpoints: what it returns, in what order, and that no answer depends on the batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest

from llava_serve.config import EngineOptions
from llava_serve.errors import CheckpointError, PromptTooLongError, RequestError, UnsupportedParameterError
from llava_serve.llm import LLM
from llava_serve.results import GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import ImagePart, Message, TextPart
from support.paths import GOLDEN

IMAGES = [GOLDEN / "images" / name for name in ("landscape.png", "portrait.png", "photo.jpg")]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def test_a_kv_cache_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(CheckpointError, match="kv_cache_bytes is too small"):
        LLM("builtin", device="cpu", engine=EngineOptions(kv_cache_bytes=1))


@functools.cache
def llm(name: str = "llava-v1.5-tiny", prefix_caching: bool = True) -> LLM:
    options = EngineOptions(num_threads=1, kv_cache_bytes=1 << 22, prefix_caching=prefix_caching)
    return LLM(str(GOLDEN / "checkpoints" / name), device="cpu", dtype="float64", engine=options)


def essence(result: GenerationResult) -> list[tuple[str, tuple[int, ...], str]]:
    return [(one.text, one.token_ids, one.finish_reason) for one in result.outputs]


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-mistral-tiny", "llava-mpt-tiny"])
def test_a_batch_equals_single_requests(name: str) -> None:
    queries = ["What is this?", "What is that, and why?", "Say it in three words.", "What is this?"]
    images = [IMAGES[:1], IMAGES[1:2], [], IMAGES[:1]]
    samplings = [
        GREEDY,
        SamplingParams(seed=5, n=2, max_new_tokens=9),
        SamplingParams(seed=1, top_p=0.7, top_k=40, max_new_tokens=9),
    ]
    for sampling in samplings:
        batched = llm(name).generate(queries, images=images, sampling=sampling)
        single = [
            llm(name, prefix_caching=False).generate(query, images=each, sampling=sampling)
            for query, each in zip(queries, images, strict=True)
        ]
        assert list(map(essence, batched)) == list(map(essence, single))


def test_the_result_has_the_prompt_and_the_answer() -> None:
    result = llm().generate("What is this?", images=IMAGES[:1], sampling=GREEDY)
    assert result.prompt.count("<image>") == 1
    assert result.input_ids.count(-200) == 1
    assert result.num_prompt_tokens > len(result.input_ids)
    assert result.text == result.text.strip() == result.outputs[0].text
    assert len(result.token_ids) == 12
    assert result.finish_reason == "length"
    assert result.logprobs is None
    again = llm().generate("What is this?", images=IMAGES[:1], sampling=GREEDY)
    assert again.num_cached_tokens > 0
    assert again.token_ids == result.token_ids


def test_more_prompts_than_the_engine_queues() -> None:
    options = EngineOptions(num_threads=1, kv_cache_bytes=1 << 20, max_num_seqs=2, max_waiting=1)
    small = LLM(str(GOLDEN / "checkpoints" / "llava-v1.5-tiny"), device="cpu", dtype="float64", engine=options)
    queries = [f"Question {at}" for at in range(9)]
    results = small.generate(queries, sampling=GREEDY)
    assert [essence(result) for result in results] == [
        essence(llm().generate(each, sampling=GREEDY)) for each in queries
    ]


def test_chat_accepts_openai_messages_and_message_objects() -> None:
    objects = [Message("user", (ImagePart(IMAGES[0].read_bytes()), TextPart("What is this?")))]
    openai = [
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What is this?"}],
        }
    ]
    first, second = llm().chat([objects, openai], sampling=GREEDY)
    assert essence(first) == essence(second) == essence(llm().chat(openai, sampling=GREEDY))
    assert first.prompt == second.prompt


@pytest.mark.parametrize("bad", [{"role": "robot", "content": "x"}, {"role": "user", "content": [{"type": "audio"}]}])
def test_an_invalid_message_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        llm().chat([bad])


def test_the_stream_joined_is_the_answer() -> None:
    chunks = list(llm().stream("What is this?", IMAGES[:1], GREEDY))
    whole = llm().generate("What is this?", images=IMAGES[:1], sampling=GREEDY)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(itertools.chain.from_iterable(chunk.token_ids for chunk in chunks)) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


def test_streams_may_be_interleaved() -> None:
    queries = ["What is this?", "Say it in three words."]
    streams = [llm().stream(query, sampling=GREEDY) for query in queries]
    texts = ["", ""]
    for pair in itertools.zip_longest(*streams):
        for at, chunk in enumerate(pair):
            texts[at] += chunk.text if chunk else ""
    assert texts == [result.text for result in llm().generate(queries, sampling=GREEDY)]


def test_a_closed_stream_frees_its_blocks() -> None:
    stream = llm().stream("What is this?", sampling=SamplingParams(ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm().engine.has_work
    assert llm().engine.stats.free_blocks == llm().engine.stats.total_blocks


def test_a_stop_string_ends_the_answer_and_is_not_in_it() -> None:
    whole = llm().generate("What is this?", sampling=GREEDY)
    stop = whole.text[4:7]
    cut = llm().generate("What is this?", sampling=SamplingParams(temperature=0, max_new_tokens=12, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)].rstrip()
    assert cut.finish_reason == "stop"
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert not llm().engine.has_work


def test_logprobs_have_their_alternatives() -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=4, logprobs=3)
    result = llm().generate("What is this?", sampling=sampling)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    for entry in result.logprobs:
        assert entry.top[0][0] == entry.token_id
        assert entry.top[0][2] == entry.logprob <= 0
        assert len(entry.top) == 3


def test_a_seed_repeats_and_choices_differ() -> None:
    sampling = SamplingParams(seed=3, n=3, max_new_tokens=8)
    first, second = (llm().generate("Tell me.", sampling=sampling) for _ in range(2))
    assert essence(first) == essence(second)
    assert len({one.token_ids for one in first.outputs}) == 3


def test_a_prompt_too_long_is_refused_before_anything_runs() -> None:
    with pytest.raises(PromptTooLongError) as caught:
        llm().generate("word " * 4000)
    assert caught.value.got > caught.value.limit
    assert not llm().engine.has_work


def test_a_prompt_of_another_model_is_refused_and_fails_no_other_request() -> None:
    good = llm().processor.prepare_query("What is this?", IMAGES[:1])
    bad = [
        dataclasses.replace(good, token_ids=good.token_ids + 10**6),
        dataclasses.replace(good, tiles=(good.tiles[0][:, :10],)),
        dataclasses.replace(good, tiles=(good.tiles[0].astype(object),)),
        dataclasses.replace(good, image_spans=((good.image_spans[0][0], 10**6),), token_ids=good.token_ids[:40]),
        dataclasses.replace(good, image_spans=()),
        dataclasses.replace(good, token_ids=good.token_ids[:0], image_spans=(), tiles=(), image_sizes=(), digests=()),
    ]
    for one in bad:
        with pytest.raises(RequestError, match="another model"):
            llm().run([one])
    assert llm().run([good], GREEDY)[0].finish_reason == "length"


def test_an_answer_is_cut_where_the_context_ends() -> None:
    limit = llm().engine.stats.total_blocks * 16  # the cache is smaller than the model's context
    prepared = llm().processor.prepare_query("a " * (limit - 140))
    room = limit - prepared.num_tokens
    assert 0 < room < 60
    sampling = SamplingParams(temperature=0, max_new_tokens=500, ignore_eos=True)
    result = llm().run([prepared], sampling)[0]
    assert len(result.token_ids) == room
    assert result.finish_reason == "length"


def test_beams_with_logprobs_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        llm().generate("x", sampling=SamplingParams(temperature=0, num_beams=2, logprobs=1))
    assert caught.value.param == "logprobs"
