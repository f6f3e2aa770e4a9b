"""AsyncLLM: streams, how they end, and that other requests are not affected."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from llava_serve.async_llm import AsyncLLM
from llava_serve.config import EngineOptions, ImageOptions, ModelOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.sequence import Output
from llava_serve.errors import CapacityError, DeadlineExceededError, EngineDeadError, PromptTooLongError, RequestError
from llava_serve.llm import LLM
from llava_serve.processor import Processor
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, PreparedPrompt
from support.paths import GOLDEN

MODEL = ModelOptions(model=str(GOLDEN / "checkpoints" / "llava-v1.5-tiny"), device="cpu", dtype="float64")
OPTIONS = EngineOptions(num_threads=1, kv_cache_bytes=1 << 22, max_num_seqs=8, max_waiting=4)
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
LONG = SamplingParams(temperature=0, max_new_tokens=1500, ignore_eos=True)


@pytest.fixture
async def subject() -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(MODEL, OPTIONS)
    yield llm
    llm.close()


def prepare(llm: AsyncLLM, text: str = "What is this?") -> PreparedPrompt:
    image = GOLDEN / "images" / "landscape.png"
    return Processor(llm.spec, ImageOptions()).prepare_query(text, [image])


async def collect(llm: AsyncLLM, prepared: PreparedPrompt, sampling: SamplingParams = GREEDY) -> list[Chunk]:
    return [chunk async for chunk in llm.generate_prepared(prepared, sampling)]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition is not met after half a minute")


async def idle(llm: AsyncLLM) -> None:
    """Waits until the engine holds nothing."""
    await until(lambda: not (llm.stats().running or llm.stats().waiting))
    assert llm.stats().free_blocks == llm.stats().total_blocks


async def running(llm: AsyncLLM) -> None:
    """Waits until the engine computes something."""
    await until(lambda: llm.stats().running > 0)


async def test_streams_are_what_llm_answers(subject: AsyncLLM) -> None:
    offline = LLM(MODEL.model, device="cpu", dtype="float64", engine=OPTIONS)
    prompts = [prepare(subject, f"Question {at}?") for at in range(6)]
    samplings = [GREEDY, SamplingParams(seed=3, n=2, max_new_tokens=9), SamplingParams(seed=4, top_p=0.5)] * 2
    streams = await asyncio.gather(*map(collect, [subject] * 6, prompts, samplings))
    for prompt, sampling, chunks in zip(prompts, samplings, streams, strict=True):
        expected = offline.run([prompt], sampling)[0]
        for output in expected.outputs:
            own = [chunk for chunk in chunks if chunk.index == output.index]
            assert "".join(chunk.text for chunk in own) == output.text
            assert tuple(token for chunk in own for token in chunk.token_ids) == output.token_ids
            assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == [output.finish_reason]
            assert own[-1].num_prompt_tokens == prompt.num_tokens


async def test_tokens_are_streamed_as_they_are_sampled(subject: AsyncLLM) -> None:
    stream = subject.generate_prepared(prepare(subject), LONG)
    first = await anext(stream)
    assert len(first.token_ids) == 1
    assert subject.stats().running == 1
    await stream.aclose()


async def test_closing_a_stream_frees_its_blocks(subject: AsyncLLM) -> None:
    stream = subject.generate_prepared(prepare(subject), LONG)
    await anext(stream)
    await stream.aclose()
    await idle(subject)


async def test_cancelling_the_consumer_aborts_the_request(subject: AsyncLLM) -> None:
    task = asyncio.create_task(collect(subject, prepare(subject), LONG))
    await running(subject)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(subject)
    assert len(await collect(subject, prepare(subject))) > 0


async def test_abort_ends_a_stream_where_it_is(subject: AsyncLLM) -> None:
    stream = subject.generate_prepared(prepare(subject), LONG, request_id="one")
    await anext(stream)
    subject.abort("one")
    rest = [chunk async for chunk in stream]
    assert all(chunk.finish_reason is None for chunk in rest)
    await idle(subject)


async def test_a_stop_string_aborts_the_request_too(subject: AsyncLLM) -> None:
    text = "".join(chunk.text for chunk in await collect(subject, prepare(subject)))
    sampling = SamplingParams(temperature=0, max_new_tokens=1500, ignore_eos=True, stop=(text[2:5],))
    chunks = await collect(subject, prepare(subject), sampling)
    assert chunks[-1].finish_reason == "stop"
    assert text.startswith("".join(chunk.text for chunk in chunks))
    await idle(subject)


async def test_a_deadline_in_the_past_or_on_the_way(subject: AsyncLLM) -> None:
    with pytest.raises(DeadlineExceededError):
        await anext(subject.generate_prepared(prepare(subject), GREEDY, deadline=time.time() - 1))
    with pytest.raises(DeadlineExceededError):
        async for _ in subject.generate_prepared(prepare(subject), LONG, deadline=time.time() + 0.3):
            pass
    await idle(subject)


async def test_a_full_queue_refuses_at_once_and_serves_what_it_holds(subject: AsyncLLM) -> None:
    prepared = prepare(subject)
    first = SamplingParams(temperature=0, max_new_tokens=400, ignore_eos=True)
    each = (first, *[LONG] * 11)
    accepted = [asyncio.create_task(collect(subject, prepared, sampling)) for sampling in each]
    await asyncio.sleep(0)
    with pytest.raises(CapacityError):
        await anext(subject.generate_prepared(prepared, GREEDY))
    for task in accepted[1:]:
        task.cancel()
    assert (await accepted[0])[-1].finish_reason == "length"
    await idle(subject)


async def test_a_prompt_too_long_fails_no_other_request(subject: AsyncLLM) -> None:
    other = asyncio.create_task(collect(subject, prepare(subject)))
    with pytest.raises(PromptTooLongError):
        await anext(subject.generate_prepared(PreparedPrompt(token_ids=prepare(subject).token_ids.repeat(40)), GREEDY))
    assert (await other)[-1].finish_reason == "length"


async def test_a_request_id_is_used_once_at_a_time(subject: AsyncLLM) -> None:
    stream = subject.generate_prepared(prepare(subject), LONG, request_id="same")
    await anext(stream)
    with pytest.raises(RequestError):
        await anext(subject.generate_prepared(prepare(subject), GREEDY, request_id="same"))
    assert (await anext(stream)).token_ids
    await stream.aclose()


async def test_a_dead_engine_fails_all_requests_at_once(subject: AsyncLLM) -> None:
    waiting = [asyncio.create_task(collect(subject, prepare(subject), LONG)) for _ in range(3)]
    await running(subject)
    del subject._loop.engine._runner  # any bug of ours: the loop cannot go on
    for task in waiting:
        with pytest.raises(EngineDeadError):
            await task
    assert not subject.healthy
    with pytest.raises(EngineDeadError):
        await collect(subject, prepare(subject))


async def test_an_engine_that_hangs_is_not_healthy(subject: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"engine_loop._HEARTBEAT_S": 0.05, "step_limit._MIN_S": 0.5, "step_limit._SLOWER": 0}.items():
        monkeypatch.setattr(f"llava_serve.engine.{name}", seconds)
    for _ in range(2):  # the first steps of a kind are not measured
        await collect(subject, prepare(subject))
    hangs = threading.Event()
    step = Engine.step

    def hang(engine: Engine) -> list[Output]:
        hangs.wait(60)
        return step(engine)

    await until(lambda: subject.healthy)
    monkeypatch.setattr(Engine, "step", hang)
    task = asyncio.create_task(collect(subject, prepare(subject)))
    await until(lambda: not subject.healthy)
    hangs.set()
    await task
    await until(lambda: subject.healthy)


async def test_how_long_a_step_may_take_follows_the_steps_before_it(
    subject: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()

    def healthy_after(seconds: float) -> bool:
        with monkeypatch.context() as later:
            later.setattr("llava_serve.engine.engine_loop.time.monotonic", lambda: now + seconds)
            return subject.healthy

    assert (healthy_after(280), healthy_after(310)) == (True, False)  # nothing is measured
    limit = subject._loop.engine.step_limit
    await collect(subject, prepare(subject), SamplingParams(temperature=0, max_new_tokens=900, ignore_eos=True))
    now = subject._loop._heartbeat
    assert (healthy_after(4), healthy_after(310)) == (True, False)
    limit.begin(1, 0, 0)
    assert limit.seconds < 280  # steps that decode have been measured
    limit.begin(1, 40, 1)
    assert limit.seconds == 300  # prompts beside them have not


async def test_batch_work_takes_no_place_of_online_requests(subject: AsyncLLM) -> None:
    prepared = prepare(subject)
    batch = [subject.generate_prepared(prepared, LONG, priority=1) for _ in range(8)]
    await asyncio.gather(*map(anext, batch))
    tasks = [asyncio.create_task(collect(subject, prepared, GREEDY)) for _ in range(12)]
    assert all(chunks[-1].finish_reason for chunks in await asyncio.gather(*tasks))
    for stream in batch:
        await stream.aclose()
    await idle(subject)


async def test_the_queue_counts_sequences(subject: AsyncLLM) -> None:
    many = SamplingParams(seed=1, n=12, max_new_tokens=1500, ignore_eos=True)
    stream = subject.generate_prepared(prepare(subject), many)
    await anext(stream)
    with pytest.raises(CapacityError):
        await anext(subject.generate_prepared(prepare(subject), GREEDY))
    await stream.aclose()
    await idle(subject)
    assert await collect(subject, prepare(subject))


async def test_closing_fails_requests_in_flight() -> None:
    llm = AsyncLLM(MODEL, OPTIONS)
    assert llm.healthy
    assert llm.model_name == "llava-v1.5-tiny"
    waiting = asyncio.create_task(collect(llm, prepare(llm), LONG))
    await running(llm)
    llm.close()
    with pytest.raises(EngineDeadError):
        await waiting
    assert not llm.healthy


@pytest.mark.parametrize(("before", "after"), [(5e-3, 5e-4), (1e-4, 1e-4)])
async def test_the_engine_gets_the_interpreter_back_soon(before: float, after: float) -> None:
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)
        AsyncLLM(MODEL, OPTIONS).close()
        assert sys.getswitchinterval() == pytest.approx(after, rel=0.1)  # the user's own is kept where it is shorter
    finally:
        sys.setswitchinterval(interval)
