"""A check at load: the engine computes a language model as transformers does. A wrong answer looks like a right one."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kernels.native_attention import decode_attention
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.model import VisionLanguageModel, kv_shape
from llava_serve.errors import CheckpointError

LENGTH = 32
"""Positions of each of the two sequences."""
_STEPS = (((0, 29), (0, 5)), ((29, 30), (5, 30)), ((30, 31), (30, 31)), ((31, 32), (31, 32)))
"""What a step computes of both sequences, as [start, end): prompts whole and in chunks, then single tokens."""
_TOLERANCE = 1e-2
"""Rotary tables in half precision may be rounded otherwise in a compiled decoder: that alone is 1e-3."""
_HALF_TOLERANCE = 0.2
"""Of half precision, and of quantized layers, keys and values."""

_checked: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Language models that were found right, with the decoders that they had: engines may share one."""


def check_decoder(model: VisionLanguageModel, decoder: Decoder, scales: torch.Tensor | None = None) -> None:
    """Compares the logits of a few positions through the engine with those of the model's own forward pass.

    Args:
        scales: of a KV pool in 8-bit floats, see `KVPool`; None is one in the model's precision.

    Raises:
        CheckpointError: they differ, or the engine cannot compute them.
    """
    name = f"{decoder.name}{' float8' * (scales is not None)}"
    if name in _checked.get(model.language_model, ()):
        return
    kind, dtype = model.language_model.config.model_type, str(model.dtype).removeprefix("torch.")
    try:
        difference = disagreement(model, decoder, scales)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"The language model of {model.spec.name} ({kind}) cannot be computed in {dtype} on {model.device}."
        ) from error
    if difference and scales is not None:
        raise CheckpointError(
            f"With kv_cache_dtype fp8 the language model of {model.spec.name} ({kind}) answers otherwise: "
            f"{difference}. Choose auto."
        )
    if difference:
        raise CheckpointError(
            f"The engine does not compute the language model of {model.spec.name} ({kind}) as transformers does: "
            f"{difference}. It would answer wrongly, so it is not loaded."
        )
    _checked.setdefault(model.language_model, set()).add(name)


@torch.inference_mode()
def disagreement(
    model: VisionLanguageModel, decoder: Decoder, scales: torch.Tensor | None = None, page_size: int | None = None
) -> str:
    """How the engine computes a few positions otherwise than the model's own forward pass; empty if it does not.

    Args:
        page_size: of steps on a CPU with a kernel, see `PackedStep`; None is without.
    """
    vocabulary = model.language_model.get_input_embeddings().num_embeddings
    ids = torch.arange(2 * LENGTH, device=model.device) % vocabulary
    sequences = model.embed(ids).view(2, LENGTH, -1)
    expected = torch.stack([decoder.reference_logits(one) for one in sequences])
    windows: set[int | None] = set()
    deviation = _deviation(_engine_logits(model, decoder, sequences, windows, scales, page_size), expected)
    if page_size is not None and decoder.native is not None:  # it computes all these steps
        windows |= decoder.native.windows
    exact = model.dtype.itemsize >= torch.float32.itemsize and decoder.has_float_weights and scales is None
    # Rounded otherwise, a few positions may differ much: a mixture takes another of two experts that are equally good.
    worst = float(deviation.quantile(1.0 if exact else 0.9)) if len(deviation) else 0.0
    if not worst <= (_TOLERANCE if exact else _HALF_TOLERANCE):
        return f"the logits differ by {worst:.1%}"
    window = _declared_window(model.language_model.config)
    if window is not None and window not in windows:  # so few positions as here are within any published window
        return f"it does not apply the sliding window of {window} positions (sliding_window) that config.json gives"
    return ""


class _ObservedStep(PackedStep):
    """A step that adds the windows of all attention to a set."""

    windows: set[int | None]

    def attend_stored(self, layer: int, query: Any, scaling: Any, window: Any = None, slopes: Any = None) -> Any:
        self.windows.add(window)
        return super().attend_stored(layer, query, scaling, window, slopes)


def _declared_window(config: Any) -> int | None:
    """The window of some layers by a config whose class knows one; None if there is none."""
    known = any(field.name == "sliding_window" for field in dataclasses.fields(config))
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return config.sliding_window if known and "sliding_attention" in kinds else None


def _engine_logits(
    model: VisionLanguageModel,
    decoder: Decoder,
    sequences: torch.Tensor,
    windows: set[int | None],
    scales: torch.Tensor | None,
    page_size: int | None,
) -> torch.Tensor:
    """[2, LENGTH, vocabulary] in the steps of `_STEPS`. What windows there were is added to `windows`."""
    layers, kv_heads, head_dim = kv_shape(model)
    paged: Any = (1, None) if page_size is None else (page_size, decode_attention)
    room = -(-LENGTH // paged[0]) * paged[0]
    memory = KVPool(layers, kv_heads, 2 * room, head_dim, model.dtype, model.device, scales)
    logits: list[list[torch.Tensor]] = [[], []]
    for parts in _STEPS:
        packed, offset = [], 0
        for index, (start, end) in enumerate(parts):
            packed.append(PackedSequence(offset, end - start, index * room, start))
            offset += end - start
        inputs = torch.cat([sequence[start:end] for sequence, (start, end) in zip(sequences, parts, strict=True)])
        step = _ObservedStep(memory, packed, model.dtype, model.device, 0, (), *paged)
        step.windows = windows
        hidden = decoder.forward(inputs, step)
        for index, one in enumerate(packed):
            logits[index].append(decoder.logits(hidden[one.offset : one.offset + one.length]))
    return torch.stack([torch.cat(one) for one in logits])


def _deviation(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far logits [..., vocabulary] differ, as a share of the expected ones: at each position where those are
    finite, and without their mean, which changes no probability."""
    expected = expected.to(found.dtype)
    finite = expected.isfinite().all(dim=-1)
    found, expected = (one[finite] - one[finite].mean(dim=-1, keepdim=True) for one in (found, expected))
    size = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    deviation: torch.Tensor = (found - expected).norm(dim=-1) / size
    return deviation
