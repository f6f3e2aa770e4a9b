"""The scales of a KV cache in 8-bit floats."""

from __future__ import annotations

import torch

from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.model import VisionLanguageModel, kv_shape
from llava_serve.errors import CheckpointError
from llava_serve.model.float8 import has_float8

_POSITIONS = 256
"""That are computed to find the scales."""
_EXPONENT = 4
"""The largest number that is found is stored as one of up to 2**4. So others may be 28 times as large, and all down to
1/512 of it have the bits of a normal number (2**-6 and above)."""


@torch.inference_mode()
def find_scales(model: VisionLanguageModel, decoder: Decoder) -> torch.Tensor:
    """float32 [layers, 2, kv_heads], powers of two: by the largest keys and values of tokens from the whole vocabulary.

    What a decoder computes them from is normalized, so that those of other tokens, and of images, are not much larger.

    Raises:
        CheckpointError: the GPU has no 8-bit floats.
    """
    if not has_float8(model.device):
        raise CheckpointError(
            f"kv_cache_dtype is fp8, and {torch.cuda.get_device_name(model.device)} has no 8-bit floats: GPUs of "
            "compute capability 8.9 and above do. Choose auto."
        )
    layers, kv_heads, head_dim = kv_shape(model)
    length = min(_POSITIONS, model.spec.context_length)
    memory = KVPool(layers, kv_heads, length, head_dim, model.dtype, model.device)
    vocabulary = model.language_model.get_input_embeddings().num_embeddings
    ids = torch.arange(length, device=model.device) * vocabulary // length
    step = PackedStep(memory, [PackedSequence(0, length, 0, 0)], model.dtype, model.device)
    decoder.forward(model.embed(ids), step)
    largest = torch.stack([torch.stack([half.abs().float() for half in pair]) for pair in memory.layers])
    largest = largest.nan_to_num(0, 0, 0).amax((-1, -2))
    return torch.where(largest > 0, torch.exp2(largest.log2().ceil() - _EXPONENT), 1.0)
