"""A program that ends while the engine works, or prompts are prepared, ends as it would without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.paths import ROOT

ENGINE = """
import asyncio
from llava_serve import AsyncLLM, SamplingParams

async def first():
    stream = llm.stream("What?", [], SamplingParams(max_new_tokens=1500, ignore_eos=True))
    await anext(stream)
    return stream

llm = AsyncLLM("builtin")
stream = asyncio.new_event_loop().run_until_complete(first())
"""
PREPARING = """
from llava_serve import LLM, Prompt

results = LLM("builtin").generate_iter(Prompt("Is it so? " * 3_000) for _ in range(1000))  # too long: a refusal each
next(results)
"""


@pytest.mark.extended
@pytest.mark.parametrize("program", [ENGINE, PREPARING], ids=["engine", "preparing"])
def test_the_exit_status_is_that_of_the_program(program: str) -> None:
    ended = subprocess.run([sys.executable, "-c", program + "\nprint('end')"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("end\n", 0), ended.stderr
