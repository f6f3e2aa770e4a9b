"""`compile: auto`: the same answers before, during and after; and the eager decoder where compiling is of no use."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from llava_serve import LLM, AsyncLLM
from llava_serve.config import EngineOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor import background_compile
from llava_serve.engine.executor.compiled import CompiledDecoder
from llava_serve.sampling_params import SamplingParams
from support.paths import ROOT
from support.random_llava import write_llava
from support.tiny_engine import PROMPTS, TinyModel, engine, run

REQUESTS = [(one, SamplingParams(temperature=0, max_new_tokens=8)) for one in PROMPTS]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
QUERIES = ["What?", "Is it so? " * 20]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Tiny decoders are compiled, too, without waiting for a server's start, and without giving way to busy tests."""
    for name in ("MIN_WEIGHTS", "DELAY_S", "NICENESS"):
        monkeypatch.setattr(background_compile, name, 0)
    caplog.set_level(logging.INFO, "llava_serve.engine")


def switched(subject: Engine) -> None:
    """Compiles in the background, to the end."""
    compiling = subject.compile_in_background()
    assert compiling is not None
    while not compiling.done:
        time.sleep(0.01)
    compiling.switch()


def program(text: str, settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with some variables of its environment set."""
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)


def test_small_decoders_are_not_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.undo()
    assert engine(TinyModel()).compile_in_background() is None
    assert not caplog.messages


@pytest.mark.parametrize("compile", [True, False])
def test_nothing_is_compiled_in_the_background_that_is_not_auto(compile: bool) -> None:
    model = TinyModel("mpt")  # which is not compiled before the start either
    assert engine(model, compile=compile).compile_in_background() is None


def test_mpt_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    assert engine(TinyModel("mpt")).compile_in_background() is None
    assert caplog.messages == ["The decoder is not compiled, since its attention is not compiled."]


def test_a_decoder_that_cannot_be_copied_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    model = TinyModel()
    model.language_model.base_model.lock = threading.Lock()
    assert engine(model).compile_in_background() is None
    sentence = "The decoder is not compiled, and steps are slower, since the language model cannot be copied."
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", sentence)]


def test_without_a_compiler_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "none"))}):
        assert engine(TinyModel()).compile_in_background() is None
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "INFO",
        "The decoder is not compiled, since there is no C++ compiler (g++).",
    )


def test_a_compiled_decoder_that_disagrees_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(self: CompiledDecoder, embeddings: torch.Tensor, step: Any) -> torch.Tensor:
        return 1 + embeddings

    monkeypatch.setattr(CompiledDecoder, "warm_up", lambda self, dummy_step: None)
    monkeypatch.setattr(CompiledDecoder, "forward", wrong)
    subject = engine(TinyModel())
    switched(subject)
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("The decoder is not compiled, and steps are slower, since the logits differ by ")
    assert run(subject, *REQUESTS) == run(engine(TinyModel()), *REQUESTS)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_steps_go_on_while_torch_traces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of torch.fx replaces the call of all modules, for all threads."""
    traces, go_on = threading.Event(), threading.Event()

    def traced(inputs: torch.Tensor) -> torch.Tensor:
        traces.set()
        assert go_on.wait(60)
        return inputs

    expected = run(engine(TinyModel(kind)), *REQUESTS)
    monkeypatch.setattr(CompiledDecoder, "warm_up", lambda self, dummy_step: torch.fx.symbolic_trace(traced))
    subject = engine(TinyModel(kind))
    compiling = subject.compile_in_background()
    assert compiling is not None
    assert traces.wait(60)
    assert torch.nn.Module.__call__ is not torch.nn.Module._wrapped_call_impl
    try:
        assert run(subject, *REQUESTS) == expected
    finally:
        go_on.set()
        compiling._thread.join()


def test_closing_ends_a_thread_that_runs_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(self: CompiledDecoder, dummy_step: Any) -> None:
        while True:
            sum(range(1000))

    monkeypatch.setattr(CompiledDecoder, "warm_up", endless)
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    compiling = engine(TinyModel()).compile_in_background()
    assert compiling is not None
    assert not compiling.done
    compiling.close()
    assert not compiling._thread.is_alive()
    assert (sys.getswitchinterval(), torch.get_num_threads()) == (interval, threads)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_answers_are_the_same_after_the_switch_and_nothing_is_compiled_again(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject, expected = engine(TinyModel(kind)), run(engine(TinyModel(kind)), *REQUESTS)
    compiling = subject.compile_in_background()
    assert compiling is not None
    while not compiling.done:
        assert run(subject, *REQUESTS) == expected
        time.sleep(0.1)
    compiling.switch()
    assert [message.split(":")[0] for message in caplog.messages] == ["The compiled decoder serves from now on"]
    compiled = counters["stats"]["unique_graphs"]
    for requests in (REQUESTS[:1], REQUESTS, REQUESTS[1:]):
        assert run(subject, *requests) == run(engine(TinyModel(kind)), *requests)
    assert subject._runner._decoder.compiled
    assert counters["stats"]["unique_graphs"] == compiled


FAILS = """
import logging, time
from llava_serve.config import EngineOptions, ModelOptions
from llava_serve.engine.executor import background_compile
from llava_serve.engine.executor.build import build_engine

background_compile.MIN_WEIGHTS = background_compile.DELAY_S = 0
engine = build_engine(ModelOptions(), EngineOptions(num_threads=1))
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
compiling = engine.compile_in_background()
while not compiling.done:
    time.sleep(0.01)
compiling.switch()
assert engine._runner._decoder.compiled is None
"""


@pytest.mark.extended
def test_a_compiler_that_fails_is_a_warning_for_each_use(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ "$@"\nexit 1\n')
    compiler.chmod(0o755)
    settings = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = program(FAILS, settings)
    sentence = (
        "The decoder is not compiled, and steps are slower, since the C++ compiler does not compile torch's code."
    )
    kernel = (
        "The kernel prefill_attention is not used, and steps are slower, since it does not run: "
        "RuntimeError the C++ compiler does not compile it."
    )
    assert (done.stderr, done.returncode) == (f"{kernel}\nWARNING {sentence}\n", 0)


@pytest.mark.extended
async def test_a_server_answers_as_the_library_before_and_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = str(write_llava(tmp_path / "llava", hidden=128, intermediate=192, layers=2))
    options = EngineOptions(num_threads=1, kv_cache_bytes=64 << 20)
    llm = LLM(model, engine=options)
    expected = [llm.generate(query, sampling=GREEDY).token_ids for query in QUERIES]
    assert llm.engine._runner._decoder.compiled is None
    server = AsyncLLM(model, options)
    try:
        rounds_after = 0
        while rounds_after < 2:
            rounds_after += any("compiled" in message for message in caplog.messages)  # it serves, or why it does not
            await asyncio.sleep(0.1)
            assert [(await server.generate(query, sampling=GREEDY)).token_ids for query in QUERIES] == expected
    finally:
        server.close()
    assert "The compiled decoder serves from now on" in caplog.text


ENDS = """
import sys, time, psutil
from llava_serve import AsyncLLM, EngineOptions
from llava_serve.engine.executor import background_compile

background_compile.MIN_WEIGHTS = background_compile.DELAY_S = 0
llm = AsyncLLM("builtin", EngineOptions(num_threads=1))

def compilers():
    return [child for child in psutil.Process().children(recursive=True) if "cc1plus" in child.name()]

while sys.argv[1] == "compiler" and not compilers():
    time.sleep(0.01)
if sys.argv[1] == "tracing":
    time.sleep(1)
"""


@pytest.mark.extended
@pytest.mark.parametrize("end", ["", "llm.close()\nassert not compilers()"], ids=["exit", "close"])
@pytest.mark.parametrize("during", ["tracing", "compiler"])
def test_a_program_that_ends_meanwhile_ends_as_it_would_without(during: str, end: str, tmp_path: Path) -> None:
    ended = program(f"{ENDS}\n{end}\nprint('end')", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, during)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("end\n", "", 0)
