"""A tiny random vision-language model for the engine's tests: real transformers decoders, no files."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MptConfig, PreTrainedConfig, Qwen2Config

from llava_serve.config import EngineOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.errors import LlavaServeError
from llava_serve.types import IMAGE_TOKEN_ID, PreparedPrompt, SamplingParams

VOCABULARY, HIDDEN, FEATURES, CONTEXT = 97, 32, 6, 256
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=9),
    "qwen2": Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "mpt": MptConfig(d_model=HIDDEN, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=CONTEXT),
}


@dataclasses.dataclass(frozen=True)
class TinyImage:
    features_per_tile: int = FEATURES
    crop_size: tuple[int, int] = (2, 2)


@dataclasses.dataclass(frozen=True)
class TinySpec:
    """What the engine reads of a `CheckpointSpec`."""

    name: str
    path: str = "tiny"
    base: None = None
    adapter: None = None
    context_length: int = CONTEXT
    eos_token_ids: tuple[int, ...] = (2,)
    image: TinyImage = TinyImage()
    vision_config: dict[str, int] = dataclasses.field(default_factory=lambda: {"hidden_size": HIDDEN})


class TinyModel:
    """A random decoder; the features of a tile are a fixed random map of its colour."""

    def __init__(self, kind: str = "llama", dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        torch.manual_seed(3)
        config = CONFIGS[kind]
        self.spec: Any = TinySpec(kind)
        self.device, self.dtype = torch.device("cpu"), dtype
        self.language_model: Any = AutoModelForCausalLM.from_config(type(config)(**config.to_dict())).to(dtype).eval()
        for parameter in self.language_model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.25, generator=generator)
        self._tower = torch.randn(3, FEATURES * HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.encoded_tiles = 0

    def tower_features(self, tiles: torch.Tensor) -> torch.Tensor:
        self.encoded_tiles += len(tiles)
        colours = tiles[:, 0, 0].to(self.dtype) / 255
        return (colours @ self._tower).view(len(tiles), FEATURES, HIDDEN)

    def image_embeddings(self, features: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        return features.flatten(0, 1).tanh()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.language_model.get_input_embeddings()(ids)
        return embeddings


def image(colour: tuple[int, int, int], tiles: int = 1) -> np.ndarray[Any, Any]:
    """uint8 [tiles, 2, 2, 3]; each tile a little brighter than the one before."""
    return np.stack([np.full((2, 2, 3), [min(255, value + at) for value in colour], np.uint8) for at in range(tiles)])


def prompt(*parts: int | list[int] | np.ndarray[Any, Any]) -> PreparedPrompt:
    """Ids, lists of ids, and images, in order."""
    ids: list[int] = []
    spans, tiles = [], []
    for part in parts:
        if isinstance(part, np.ndarray):
            spans.append((len(ids), len(ids) + FEATURES * len(part)))
            ids += [IMAGE_TOKEN_ID] * (FEATURES * len(part))
            tiles.append(part)
        else:
            ids += [part] if isinstance(part, int) else part
    return PreparedPrompt(
        token_ids=np.array(ids, np.int32),
        image_spans=tuple(spans),
        tiles=tuple(tiles),
        image_sizes=tuple((2, 2) for _ in tiles),
        digests=tuple(f"{one.shape}{one.tobytes().hex()}" for one in tiles),
    )


_names = itertools.count()
Request = tuple[PreparedPrompt, SamplingParams]
Answer = list[list[int]]
"""Ids per choice."""


def outcomes(engine: Engine, *requests: Request) -> list[Answer | LlavaServeError]:
    """Each request's ids or error, all requests added at once; checks the engine's blocks after each step."""
    answers: dict[str, Answer] = {}
    failed: dict[str, LlavaServeError] = {}
    for one, sampling in requests:
        name = f"r{next(_names)}"
        answers[name] = [[] for _ in range(sampling.n)]
        engine.add(engine.validator.accept(name, one, sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.request_id not in failed, "nothing follows an error"
            if output.error is not None:
                failed[output.request_id] = output.error
            answers[output.request_id][output.index] += output.token_ids
        check_blocks(engine)
    assert engine.stats.free_blocks == engine.stats.total_blocks
    assert not engine._runner._embeddings
    assert not engine._searches
    return [failed.get(name, answer) for name, answer in answers.items()]


def run(engine: Engine, *requests: Request) -> list[Answer]:
    """As `outcomes`; nothing may fail."""
    answers = outcomes(engine, *requests)
    for answer in answers:
        assert not isinstance(answer, LlavaServeError), answer
    return answers  # type: ignore[return-value]


def check_blocks(subject: Engine) -> None:
    """Every reference count is the number of holders, no block is lost, and what is cached is finite."""
    kv, scheduler = subject._kv, subject._scheduler
    held = Counter(kv.cached_blocks)
    for group in scheduler.running:
        for sequence in group.sequences:
            assert sequence.extent is not None
            held.update(range(sequence.extent.start, sequence.extent.start + sequence.extent.size))
    assert all(sequence.extent is None for group in scheduler.waiting for sequence in group.sequences)
    assert kv.ref_counts == [held[block] for block in range(kv.num_blocks)]
    assert kv.num_free == sum(count == 0 for count in kv.ref_counts)
    for half in itertools.chain(*subject._runner._memory.layers):
        finite = half[:, : kv.num_blocks * kv.block_size].isfinite().all(dim=2).all(dim=0).view(-1, kv.block_size)
        assert bool(finite[list(kv.cached_blocks)].all())


def engine(model: VisionLanguageModel, *, blocks: int = 64, block_size: int = 8, **options: Any) -> Engine:
    """An engine with a KV cache of `blocks` blocks."""
    config = model.language_model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    per_position = config.num_hidden_layers * 2 * kv_heads * head_dim * model.dtype.itemsize
    cache = blocks * block_size * per_position
    return Engine(model, EngineOptions(kv_cache_bytes=cache, block_size=block_size, **options))


def reference_ids(model: TinyModel, one: PreparedPrompt, count: int) -> list[int]:
    """Greedy ids by transformers itself, without a cache: a full forward pass per token."""
    language_model = model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    embeddings = model.embed(torch.tensor(one.token_ids).long().clamp(min=0))
    for (start, end), tiles in zip(one.image_spans, one.tiles, strict=True):
        embeddings[start:end] = model.image_embeddings(model.tower_features(torch.from_numpy(tiles)), (2, 2))
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < count and (not ids or ids[-1] != 2):
            logits = language_model(inputs_embeds=embeddings[None], use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            embeddings = torch.cat([embeddings, model.embed(torch.tensor([ids[-1]]))])
    language_model.set_attn_implementation(before)
    return ids
