"""A tiny random vision-language model for the engine's tests: real transformers decoders, no files."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llava_serve.config import EngineOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.sequence import PromptLogprobs
from llava_serve.errors import LlavaServeError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import IMAGE_TOKEN_ID, PreparedPrompt

VOCABULARY, HIDDEN, FEATURES, CONTEXT = 97, 32, 6, 256
_LLAMA = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = {"sliding_window": 9}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MPT = {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": CONTEXT}
_GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 8.0}


def _rotary(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, **settings}}


_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("llama", _rotary("linear")),
    "llama-llama3": ("llama", _rotary("llama3", **_LLAMA_3)),
    "llama-yarn": ("llama", _rotary("yarn", original_max_position_embeddings=64)),
    "qwen2-full": ("qwen2", {"use_sliding_window": False, "sliding_window": 131072}),
    "gemma2-bounded-head": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": 0.5},
    ),
}
_KINDS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("apertus", "arcee", "bitnet", "cohere", "llama", "olmo2", "phi")},
    **{kind: {"head_dim": 8} for kind in ("glm", "glm4", "helium", "ministral3", "seed_oss")},
    **dict.fromkeys(("cohere2", "exaone4", "mistral", "olmo3", "phi3", "starcoder2"), _WINDOW),
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOW},
    "granite": _GRANITE,
    "ministral": {"head_dim": 8, **_WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": _MPT,
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24, **_EXPERTS},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, **_EXPERTS},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
}
CONFIGS = _VARIANTS | {kind: (kind, settings) for kind, settings in _KINDS.items()}
"""By name: a text model's `model_type`, and its settings beside the common ones."""


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
    feature_width: int = HIDDEN
    tokenizer: None = None


_MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
"""Their experts have no kernel in float64."""


def dtype_of(kind: str) -> torch.dtype:
    """The best precision that a model of `CONFIGS` has."""
    return torch.float32 if CONFIGS[kind][0] in _MIXTURES else torch.float64


class TinyModel:
    """A random decoder; the features of a tile are a fixed random map of its colour.

    Args:
        kind: of `CONFIGS`.
        others: settings of the decoder.
    """

    def __init__(self, kind: str = "llama", dtype: torch.dtype = torch.float64, **others: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        torch.manual_seed(3)
        model_type, settings = CONFIGS[kind]
        common = {} if model_type == "mpt" else _LLAMA
        config = AutoConfig.for_model(model_type, **common | settings | others)
        self.spec: Any = TinySpec(kind)
        self.device, self.dtype = torch.device("cpu"), dtype
        self.language_model: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for parameter in self.language_model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.25, generator=generator)
        self._tower = torch.randn(3, FEATURES * HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.vision_tower: torch.nn.Module = torch.nn.Identity()  # none of transformers'
        self.encoded_tiles = 0

    def modules(self) -> Iterator[torch.nn.Module]:
        modules: Iterator[torch.nn.Module] = self.language_model.modules()
        return modules

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


def scores(engine: Engine, *requests: Request) -> list[PromptLogprobs | None]:
    """What each request gets of its prompt, all requests added at once; nothing may fail."""
    names = [f"r{next(_names)}" for _ in requests]
    for name, (one, sampling) in zip(names, requests, strict=True):
        engine.add(engine.validator.accept(name, one, sampling))
    found: dict[str, PromptLogprobs] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            if output.prompt_logprobs is not None:
                assert output.request_id not in found, "they come once"
                found[output.request_id] = output.prompt_logprobs
        check_blocks(engine)
    return [found.get(name) for name in names]


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
        positions = half[:, : kv.num_blocks * kv.block_size].float()
        finite = positions.isfinite().all(dim=2).all(dim=0).view(-1, kv.block_size)
        assert bool(finite[list(kv.cached_blocks)].all())


def engine(
    model: VisionLanguageModel, *, blocks: int = 64, block_size: int = 8, ahead: bool | None = None, **options: Any
) -> Engine:
    """An engine with a KV cache of `blocks` blocks."""
    config = model.language_model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    itemsize = 1 if options.get("kv_cache_dtype") == "fp8" else model.dtype.itemsize
    per_position = config.num_hidden_layers * 2 * kv_heads * head_dim * itemsize
    cache = blocks * block_size * per_position
    return Engine(model, EngineOptions(kv_cache_bytes=cache, block_size=block_size, **options), ahead=ahead)


def reference_logits(model: TinyModel, one: PreparedPrompt) -> torch.Tensor:
    """[positions, vocabulary] of a prompt without images, by transformers itself."""
    model.language_model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = model.language_model(torch.tensor(one.token_ids).long()[None], use_cache=False).logits[0]
    return logits


def reference_table(model: TinyModel, one: PreparedPrompt) -> torch.Tensor:
    """[positions, vocabulary]: logits of a prompt with its images, by transformers itself."""
    language_model = model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = language_model(inputs_embeds=_embeddings(model, one)[None], use_cache=False).logits[0]
    language_model.set_attn_implementation(before)
    return logits


def _embeddings(model: TinyModel, one: PreparedPrompt) -> torch.Tensor:
    """[positions, hidden], the images' merged in."""
    embeddings = model.embed(torch.tensor(one.token_ids).long().clamp(min=0))
    for (start, end), tiles in zip(one.image_spans, one.tiles, strict=True):
        embeddings[start:end] = model.image_embeddings(model.tower_features(torch.from_numpy(tiles)), (2, 2))
    return embeddings


def reference_ids(model: TinyModel, one: PreparedPrompt, count: int) -> list[int]:
    """Greedy ids by transformers itself, without a cache: a full forward pass per token."""
    language_model = model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    embeddings = _embeddings(model, one)
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < count and (not ids or ids[-1] != 2):
            logits = language_model(inputs_embeds=embeddings[None], use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            embeddings = torch.cat([embeddings, model.embed(torch.tensor([ids[-1]]))])
    language_model.set_attn_implementation(before)
    return ids


PROMPTS = [
    prompt(1, [5, 6, 7]),
    prompt(1, image((10, 20, 30), 2), [8, 9]),
    prompt(1, list(range(3, 60))),
    prompt(1, image((200, 20, 30)), [8, 9], image((0, 20, 30), 3), 4),
]
"""With text alone, and with images at several places."""
