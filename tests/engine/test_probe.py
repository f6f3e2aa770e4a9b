"""A model is asked its probes before it gets requests: by a replica, and by the server in one process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.model import LlavaModel
from llava_serve.app_options import Probe
from llava_serve.cli import main
from llava_serve.config import EngineOptions, ModelOptions
from llava_serve.errors import CheckpointError
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, data_url
from support.paths import CONFIG

ENGINE = EngineOptions(num_threads=1, kv_cache_bytes=64 << 20)


def probe(**fields: Any) -> Probe:
    return Probe(**{"image": "demo.png", "question": DEMO_QUESTION, "expect": DEMO_ANSWER} | fields)


def replica(*probes: Probe) -> LlavaModel:
    return LlavaModel(ModelOptions(device="cpu"), ENGINE, probes=probes)


async def test_a_replica_whose_answers_are_right_starts() -> None:
    """In a running event loop, as Serve constructs it."""
    images = ("demo.png", str(DEMO_IMAGE), data_url(DEMO_IMAGE.read_bytes()))
    model = await asyncio.to_thread(replica, *(probe(image=image, expect="RED") for image in images))
    model.check_health()
    assert (await model.stats())["running"] == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"expect": "blue"}, r"'What colour is the circle\?' is answered '.*red.*', without 'blue'"),
        ({"image": "/no/such.png"}, r"'What colour is the circle\?' cannot be answered: "),
        ({"question": "What? " * 5000}, "cannot be answered: This model's maximum context length"),
    ],
)
async def test_a_wrong_answer_fails_the_replica_with_the_reason(wrong: dict[str, str], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        replica(probe(), probe(**wrong))


def test_the_server_in_one_process_has_the_probes_of_its_config(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    shipped = CONFIG.read_text()
    config.write_text(shipped.replace("expect: red", "expect: blue"))
    assert config.read_text() != shipped
    assert main(["serve", "--in-process", "--device", "cpu", "--port", "0", str(config)]) != 0
    assert "without 'blue'" in capsys.readouterr().err
