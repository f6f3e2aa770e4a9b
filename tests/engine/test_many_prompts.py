"""Lists of prompts on the tiny checkpoints: a bad one fails alone and by its index, and memory stays bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache

import pytest

from llava_serve import LLM, DeadlineExceededError, EngineOptions, GenerationResult, InvalidImageError, Prompt
from llava_serve.errors import LlavaServeError, PromptTooLongError, RequestError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Query
from support.paths import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"
SHORT = SamplingParams(temperature=0, max_new_tokens=2)
NUM_SEQS = 3


@cache
def llm() -> LLM:
    options = EngineOptions(num_threads=1, kv_cache_bytes=1 << 22, max_num_seqs=NUM_SEQS)
    return LLM(str(GOLDEN / "checkpoints" / "llava-v1.5-tiny"), device="cpu", dtype="float64", engine=options)


def test_a_bad_prompt_of_a_list_is_named_by_its_index() -> None:
    with pytest.raises(InvalidImageError, match=r"^Prompt 1: The picture nowhere.png cannot be read") as caught:
        llm().generate(["What?"] * 3, images=[PICTURE, "nowhere.png", None], sampling=SHORT)
    assert caught.value.index == 1
    assert caught.value.message.startswith("The picture nowhere.png")
    assert not llm().engine.has_work


def test_an_error_is_returned_in_the_place_of_its_answer() -> None:
    queries = ["What?", "word " * 4000, "What?", "What?"]
    images = [PICTURE, None, "nowhere.png", PICTURE]
    results = llm().generate(queries, images, SHORT, errors="return")
    assert [type(each) for each in results] == [
        GenerationResult,
        PromptTooLongError,
        InvalidImageError,
        GenerationResult,
    ]
    assert [each.index for each in results if isinstance(each, LlavaServeError)] == [1, 2]
    alone = llm().generate("What?", PICTURE, SHORT)
    assert [each.text for each in results if isinstance(each, GenerationResult)] == [alone.text] * 2


def test_chat_returns_errors_too() -> None:
    good, bad = [{"role": "user", "content": "What?"}], [{"role": "robot", "content": "What?"}]
    first, second = llm().chat([bad, good], SHORT, errors="return")
    assert isinstance(first, RequestError)
    assert first.index == 0
    assert isinstance(second, GenerationResult)


def test_a_deadline_ends_each_prompt() -> None:
    results = llm().generate(["What?"] * 5, sampling=SHORT, errors="return", timeout=1e-9)
    assert [type(each) for each in results] == [DeadlineExceededError] * 5
    assert [str(each)[:9] for each in results] == [f"Prompt {index}:" for index in range(5)]


def test_errors_of_a_single_prompt_are_raised_only() -> None:
    with pytest.raises(RequestError, match="errors is for a list"):
        llm().generate("What?", errors="return")  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="'raise' or 'return'"):
        llm().generate(["What?"], errors="ignore")  # type: ignore[call-overload]


def test_prompts_are_taken_as_the_engine_has_room() -> None:
    lock = threading.Lock()
    taken = read = finished = 0
    most_taken = most_read = 0

    def ask() -> Query:
        nonlocal read, most_read
        with lock:
            read += 1
            most_read = max(most_read, read - finished)
        return Query("What?")

    def prompts() -> Iterator[Prompt]:
        nonlocal taken, most_taken
        for _ in range(120):
            taken += 1
            most_taken = max(most_taken, taken - finished)
            yield Prompt(ask, sampling=SHORT)

    numbers = []
    for number, result in llm().generate_iter(prompts()):
        assert isinstance(result, GenerationResult)
        with lock:
            finished += 1
        numbers.append(number)
    assert sorted(numbers) == list(range(120))
    assert NUM_SEQS < most_read <= 2 * NUM_SEQS + 1  # and the one that was just given, which is counted after it is
    assert most_taken <= 2 * NUM_SEQS + 1


def test_prompts_are_prepared_while_the_engine_works() -> None:
    released = threading.Event()

    def late() -> Query:
        assert released.wait(60)
        return Query("What?")

    results = llm().generate_iter([Prompt("What?", sampling=SHORT), Prompt(late, sampling=SHORT)])
    first, _ = next(results)  # would wait for ever if all prompts were prepared before the first step
    released.set()
    assert (first, next(results)[0]) == (0, 1)


def test_an_unexpected_failure_is_the_result_of_its_prompt_alone(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Query:
        raise KeyError("a bug")

    results = dict(llm().generate_iter([Prompt(broken), Prompt("What?", sampling=SHORT)]))
    assert str(results[0]) == "The server failed on this request."
    assert isinstance(results[1], GenerationResult)
    assert "KeyError: 'a bug'" in caplog.text


def test_a_closed_iterator_frees_all_blocks_and_takes_no_more() -> None:
    taken = 0

    def prompts() -> Iterator[Prompt]:
        nonlocal taken
        while True:
            taken += 1
            yield Prompt("What?", sampling=SHORT)

    results = llm().generate_iter(prompts())
    next(results)
    results.close()
    assert taken <= 2 * NUM_SEQS
    assert not llm().engine.has_work
    assert llm().engine.stats.free_blocks == llm().engine.stats.total_blocks
