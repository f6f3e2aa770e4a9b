"""While one model replaces another, no prompt of the one goes to the other."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from deployments import model_gate
from deployments.model import LlavaModel
from deployments.model_gate import wait_for_model
from deployments.preprocessor import ImagePreprocessor
from llava_serve.config import EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import EngineDeadError, Failure, ModelStartingError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Message, PreparedPrompt, TextPart

ENGINE = EngineOptions(num_threads=1, kv_cache_bytes=64 << 20)


class Tier:
    """A handle whose calls end with these, in order."""

    def __init__(self, *outcomes: bool | Exception | None) -> None:
        self.outcomes = list(outcomes)

    def options(self, method_name: str) -> Tier:
        assert hasattr(LlavaModel, method_name)
        return self

    def remote(self, prompt_key: str) -> asyncio.Future[bool]:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        elif outcome is not None:  # else there is no replica
            answer.set_result(outcome)
        return answer


async def test_a_replica_waits_for_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_gate, "INTERVAL_S", 0.0)
    monkeypatch.setattr(model_gate, "CALL_TIMEOUT_S", 0.1)
    tier: Any = Tier(None, EngineDeadError("It is lost."), AttributeError("takes"), False, True, True)
    await wait_for_model(tier, "key")
    assert tier.outcomes == [True]


async def test_a_prompt_for_another_model_is_refused_to_be_sent_again() -> None:
    def tier(**options: Any) -> ImagePreprocessor:
        return ImagePreprocessor(ModelOptions(**options), ImageOptions())

    async def outcome(picture_tier: ImagePreprocessor) -> object:
        asked = [Message("user", (TextPart("What is this?"),))]
        prepared = await picture_tier.prepare(asked, None, time.time() + 60)
        assert isinstance(prepared, PreparedPrompt)
        greedy = SamplingParams(temperature=0, max_new_tokens=1)
        return [item async for item in model.generate(prepared, greedy, 0, "call", time.time() + 60)][-1]

    model = await asyncio.to_thread(LlavaModel, ModelOptions(device="cpu"), ENGINE)
    assert not isinstance(await outcome(tier()), Failure)
    refused = await outcome(tier(conv_mode="plain"))
    assert isinstance(refused, Failure)
    assert isinstance(refused.error, ModelStartingError)
    assert await model.takes(ModelOptions(dtype="float32").prompt_key)
    assert not await model.takes(ModelOptions(conv_mode="plain").prompt_key)
