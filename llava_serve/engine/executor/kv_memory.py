"""How many blocks the KV cache gets. On CUDA it takes what the largest step leaves, which is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.executor.model import VisionLanguageModel, kv_shape
from llava_serve.engine.executor.model_runner import ModelRunner
from llava_serve.engine.executor.sampler import sample
from llava_serve.engine.sequence import EngineRequest, Sequence
from llava_serve.errors import CheckpointError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt

CPU_BYTES = 1 << 30
"""Of the KV cache on a CPU, unless the options say otherwise."""
_LIBRARIES = 256 << 20
"""What CUDA's libraries and the graphs of decode steps hold beside what torch allocates."""


_SAMPLING = 6
"""Tensors of the logits' size that sampling has at once; memory of graphs is not given back."""


@dataclass(frozen=True, slots=True)
class PositionBytes:
    """Memory of one position.

    Attributes:
        kv: keys and values in all layers.
        image: of an image that is not computed yet: its features, and their projection.
    """

    kv: int
    image: int


def num_blocks(model: VisionLanguageModel, options: EngineOptions) -> int:
    """Blocks of the KV cache: within `kv_cache_bytes`; without that, on CUDA, a share of the memory that steps leave.

    Raises:
        CheckpointError: there is no memory for one block.
    """
    layers, kv_heads, head_dim = kv_shape(model)
    kv = layers * 2 * kv_heads * head_dim * (1 if options.kv_cache_dtype == "fp8" else model.dtype.itemsize)
    if options.kv_cache_bytes is None and model.device.type == "cuda":
        positions = _cuda_positions(model, options, kv)
        where = "the model takes all of it"
    else:
        positions = (options.kv_cache_bytes or CPU_BYTES) // kv
        where = "kv_cache_bytes is too small for it"
    if positions < options.block_size:
        raise CheckpointError(f"There is no memory for a KV cache: {where}.")
    return positions // options.block_size


def _cuda_positions(model: VisionLanguageModel, options: EngineOptions, kv: int) -> int:
    spec = model.spec
    try:
        step = measured_peak(model.device, lambda: largest_step(model, options))
    except torch.OutOfMemoryError:
        raise CheckpointError(
            "There is no memory for the largest step beside the model: lower engine.max_batch_tokens, "
            "engine.max_batch_tiles or engine.max_num_seqs."
        ) from None
    hidden = model.language_model.config.hidden_size * model.dtype.itemsize
    features = spec.feature_width * model.dtype.itemsize
    tiles = 1 + spec.image.max_tiles
    kept = 1 + min(spec.image.max_tiles, spec.image.max_grid_tiles or spec.image.max_tiles)
    return positions_within(
        torch.cuda.mem_get_info(model.device)[0] - step - kept_bytes(model, options),
        options.gpu_memory_fraction,
        PositionBytes(kv, hidden + features * tiles // kept),
        options.max_num_seqs * kept * spec.image.features_per_tile,
    )


def kept_bytes(model: VisionLanguageModel, options: EngineOptions) -> int:
    """What is held between steps: features of images, the graphs' logits and sampling, and what libraries hold."""
    logits: int = options.max_num_seqs * model.language_model.config.vocab_size * 4
    return options.feature_cache_bytes + options.cuda_graphs * (1 + _SAMPLING) * logits + _LIBRARIES


def positions_within(free: int, fraction: float, each: PositionBytes, image_positions: int) -> int:
    """Positions of the cache.

    An image that is not computed yet has its positions in the cache, so its features and projection take memory by
    position, too: of all positions, or of one image for every sequence, whichever is less.

    Args:
        free: bytes beside everything else.
        fraction: of them that is used.
        image_positions: of one image for every sequence.
    """
    budget = int(free * fraction)
    return max(budget // (each.kv + each.image), (budget - image_positions * each.image) // each.kv)


def measured_peak(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that a call allocates on a GPU at its peak, beyond what is allocated before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    return peak


@torch.inference_mode()
def largest_step(model: VisionLanguageModel, options: EngineOptions) -> None:
    """Computes a step of the most tiles, positions and sampled sequences, over a KV cache of its own."""
    without_graphs = options.model_copy(update={"cuda_graphs": False, "compile": False})
    blocks = -(-options.max_batch_tokens // options.block_size)
    logits = ModelRunner(model, blocks, without_graphs).run_largest(options)
    sampling = SamplingParams(top_p=0.9, repetition_penalty=1.1, logprobs=0)
    request = EngineRequest("", PreparedPrompt(np.zeros(1, np.int32)), sampling, None, 0, 0, 1, frozenset())
    sequences = [Sequence(request, index, [0]) for index in range(len(logits))]
    sample(logits, sequences, torch.ones(0, dtype=torch.bool, device=logits.device)).read()
