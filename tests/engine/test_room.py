"""What a model takes, and what there is: positions, memory, devices. Said before the weights are read."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import psutil
import pytest
import torch

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.engine.executor.build import resolve_device
from llava_serve.errors import CheckpointError, PromptTooLongError
from llava_serve.llm import LLM
from llava_serve.model.container import available_cores, container_memory
from llava_serve.model.llava import Llava
from llava_serve.model.memory import check_memory
from llava_serve.processor import Processor
from llava_serve.sampling_params import SamplingParams

SMALL = EngineOptions(num_threads=1, kv_cache_bytes=1 << 22)
LONG = SamplingParams(temperature=0, max_new_tokens=500, ignore_eos=True)


def test_max_model_len_bounds_prompt_and_answer(llava_15: Path) -> None:
    length = len(Processor(open_checkpoint(str(llava_15)), ImageOptions()).prepare_query("Why?").token_ids)
    llm = LLM(str(llava_15), engine=SMALL.model_copy(update={"max_model_len": length + 7}), device="cpu")
    result = llm.generate("Why?", None, LONG)
    assert (result.num_prompt_tokens, len(result.token_ids), result.finish_reason) == (length, 7, "length")
    with pytest.raises(PromptTooLongError) as error:
        llm.generate("Why? " * 40, None, LONG)
    assert error.value.limit == length + 6


def test_max_model_len_beyond_the_context_is_refused_with_both_numbers(llava_15: Path) -> None:
    context = open_checkpoint(str(llava_15)).context_length
    with pytest.raises(CheckpointError, match=rf"max_model_len is {context + 1}, .* has {context} positions"):
        LLM(str(llava_15), engine=SMALL.model_copy(update={"max_model_len": context + 1}))


def test_a_model_that_does_not_fit_the_memory_is_refused_before_its_weights_are_read(llava_15: Path) -> None:
    config = json.loads((llava_15 / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    (llava_15 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        Llava.load(open_checkpoint(str(llava_15)))
    # 80 layers x (2 x 8192² of queries and outputs + 3 x 8192 x 28672) x 4 bytes = 268 GB, and keys, values, the rest
    assert "needs 271.4 GB for its weights in float32, and cpu has" in error.value.message
    assert "choose fewer bits (dtype: bfloat16" in error.value.message


def test_what_the_cache_may_take_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    total = psutil.virtual_memory().total
    with caplog.at_level(logging.WARNING):
        check_memory("a-model", 1, 0, torch.device("cpu"), torch.float32)
        assert not caplog.messages
        check_memory("a-model", 1, total, torch.device("cpu"), torch.float32)
    [message] = caplog.messages
    assert "lower engine.kv_cache_bytes" in message
    with pytest.raises(CheckpointError, match="choose fewer bits"):
        check_memory("a-model", total, 0, torch.device("cpu"), torch.bfloat16)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    assert container_memory(tmp_path) > 1 << 50
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_memory(tmp_path) > 1 << 50
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_memory(tmp_path) == 450
    (tmp_path / "memory.max").write_text("500\n")
    assert container_memory(tmp_path) == 0


def test_threads_are_no_more_than_a_containers_quota(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert available_cores(tmp_path) == cores
    for quota, expected in (("max 100000", cores), ("50000 100000", 1), ("100001 100000", min(2, cores))):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert available_cores(tmp_path) == expected


@pytest.mark.parametrize("asked", ["cuda:0,1", "cuda:0,cuda:1", "gpu", "cuda:", "mps", "2", ""])
def test_an_engine_runs_on_one_device(asked: str) -> None:
    with pytest.raises(CheckpointError, match=r"is none of them\. An engine runs on one device"):
        resolve_device(asked)
