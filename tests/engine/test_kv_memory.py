"""How large the KV cache becomes, and that the step by which a GPU's is measured is computed whole."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.executor import kv_memory
from llava_serve.engine.executor.kv_memory import CPU_BYTES, PositionBytes, kept_bytes, num_blocks, positions_within
from llava_serve.errors import CheckpointError
from support.tiny_engine import TinyModel


class OnCuda(TinyModel):
    """A model that says that it is on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)


def test_a_cpu_has_a_gibibyte_unless_the_options_say_otherwise() -> None:
    model = TinyModel()
    (whole,) = {num_blocks(model, EngineOptions()), num_blocks(model, EngineOptions(kv_cache_bytes=CPU_BYTES))}
    assert num_blocks(model, EngineOptions(kv_cache_bytes=CPU_BYTES // 4)) == whole // 4


def test_what_is_asked_for_is_what_a_gpu_gets() -> None:
    options = EngineOptions(kv_cache_bytes=1 << 24)
    assert num_blocks(OnCuda(), options) == num_blocks(TinyModel(), options)


@pytest.mark.parametrize(("step", "blocks"), [(0, True), (1 << 30, True), (9 << 30, False)])
def test_a_gpu_gives_what_the_largest_step_leaves(step: int, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up figures of the driver."""
    free = 8 << 30
    monkeypatch.setattr(kv_memory, "measured_peak", lambda *_: step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 30))
    model: Any = OnCuda()
    image = SimpleNamespace(features_per_tile=5, max_tiles=4, max_grid_tiles=None)
    model.spec = SimpleNamespace(**{**dataclasses.asdict(model.spec), "image": image})
    options = EngineOptions(gpu_memory_fraction=0.5, max_num_seqs=4)
    if not blocks:
        with pytest.raises(CheckpointError, match="the model takes all of it"):
            num_blocks(model, options)
        return
    config = model.language_model.config
    head_dim = config.hidden_size // config.num_attention_heads
    kv = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 8
    each = PositionBytes(kv, (config.hidden_size + model.spec.feature_width) * 8)
    left = free - step - kept_bytes(model, options)
    # an image has an overview and four tiles of five features each
    assert num_blocks(model, options) == positions_within(left, 0.5, each, 4 * 25) // options.block_size


def test_images_in_flight_take_memory_by_position_or_by_sequence_whichever_is_less() -> None:
    each = PositionBytes(kv=900, image=100)
    assert positions_within(1_000_000, 1.0, each, image_positions=10**9) == 1000
    assert positions_within(1_000_000, 1.0, each, image_positions=0) == 1_000_000 // 900
    assert positions_within(1_000_000, 0.5, each, image_positions=100) == (500_000 - 10_000) // 900
    assert positions_within(-5, 1.0, each, image_positions=0) < 0


def test_the_graphs_keep_one_buffer_of_logits_and_what_sampling_makes_of_them() -> None:
    model = TinyModel()
    options = [EngineOptions(max_num_seqs=count, cuda_graphs=graphs) for count, graphs in ((8, True), (8, False))]
    with_graphs, without = (kept_bytes(model, one) for one in options)
    assert with_graphs - without == 7 * 8 * model.language_model.config.vocab_size * 4


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_the_largest_step_runs_the_tower_the_decoder_and_the_sampler(kind: str) -> None:
    model = TinyModel(kind, torch.float32)
    seen: list[int] = []
    embed = model.embed
    model.embed = lambda ids: seen.append(len(ids)) or embed(ids)  # type: ignore
    kv_memory.largest_step(model, EngineOptions(max_batch_tokens=300, max_batch_tiles=3, max_num_seqs=20))
    assert seen == [300]
    assert model.encoded_tiles == 3
