"""Small steps of the Llama family on a CPU, all layers in one call of C++ code (`kernels/native_decoder.cpp`).

Such a step, as most decode steps are, reads all weights for a few tokens. As some forty operations a layer, each of
which starts and waits for the threads, it reads them at half of the speed that the memory has.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.decoder import MAX_SMALL, Decoder
from llava_serve.engine.executor.decoder_check import disagreement
from llava_serve.engine.executor.kernels.native_build import build, heads_of
from llava_serve.engine.executor.llama_decoder import WINDOWS
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.executor.native_tower import use_native_tower
from llava_serve.engine.executor.packed_linear import PackedLinear, merged_projections

_logger = logging.getLogger(__name__)

_LANES = 16
"""Outputs of a product that the code computes together."""
_DTYPES = (torch.float32, torch.bfloat16)

_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer), ("inputs", _number), ("block", _number))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _pointer),
        ("qkv", _Linear),
        ("output", _Linear),
        ("mlp_norm", _pointer),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("window", _number),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _number) for name in ("num_layers", "hidden", "intermediate", "kv_heads")),
        ("norm", _pointer),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("embeddings", "cosines", "sines", "out")),
        ("rows", _number),
        ("pool", _pointer),
        ("positions", _number),
        ("table", _pointer),
        ("table_width", _number),
        ("used", _pointer),
        ("threads", _number),
    )


class NativeDecoder:
    """The layers of a language model that `supports` names, as the code in C++ reads them.

    Attributes:
        windows: of the layers' attention; None is all positions.

    Args:
        page_size: of the steps' pages.

    Raises:
        RuntimeError, OSError: the code cannot be compiled here, or not be loaded.
    """

    def __init__(self, language_model: Any, page_size: int) -> None:
        decoder, config = language_model.base_model, language_model.config
        attention = decoder.layers[0].self_attn
        group = config.num_attention_heads // config.num_key_value_heads
        self._run = _compiled(language_model.dtype, attention.head_dim, group, page_size)
        window = WINDOWS[type(language_model)]
        windows = [window(layer.self_attn) for layer in decoder.layers]
        layers = [_layer(*each) for each in zip(decoder.layers, windows, strict=True)]
        self.windows = set(windows)
        self._rotary = decoder.rotary_emb
        self._decoder = decoder  # whose weights the addresses below are
        self._model = _Model(
            (_Layer * len(layers))(*layers),
            len(layers),
            config.hidden_size,
            config.intermediate_size,
            config.num_key_value_heads,
            decoder.norm.weight.data_ptr(),
            config.rms_norm_eps,
            attention.scaling,
        )

    @staticmethod
    def supports(language_model: Any) -> bool:
        """It is of a known kind, its linear layers are in oneDNN's layout, and whole heads are rotated."""
        if type(language_model) not in WINDOWS or language_model.dtype not in _DTYPES:
            return False
        decoder, config = language_model.base_model, language_model.config
        head_dim = decoder.layers[0].self_attn.head_dim
        weight = language_model.get_input_embeddings().weight
        cosines, _ = decoder.rotary_emb(weight[None, :1], torch.zeros(1, 1, dtype=torch.long))
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        widths = config.hidden_size, config.intermediate_size, heads * head_dim
        return (
            config.hidden_act == "silu"
            and cosines.shape[2] == head_dim
            and not any(width % _LANES for width in widths)
            and all(each is not None and each.block for layer in decoder.layers for each in _linears(layer))
        )

    def forward(self, embeddings: torch.Tensor, step: PackedStep) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of input embeddings [tokens, hidden]. Those of padding are 0."""
        pages, memory = step.pages, step.memory
        assert pages is not None, "the decoder has looked"
        embeddings = embeddings.contiguous()
        cosines, sines = (part.contiguous() for part in self._rotary(embeddings[None], step.positions[None]))
        out = torch.zeros_like(embeddings)
        keys, _ = memory.layers[0]
        native = _Step(
            embeddings.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            out.data_ptr(),
            pages.count,
            keys.data_ptr(),
            keys.shape[1],
            pages.table.data_ptr(),
            pages.table.shape[1],
            pages.used.data_ptr(),
            torch.get_num_threads(),
        )
        self._run(ctypes.byref(self._model), ctypes.byref(native))
        return out


def use_native_code(model: VisionLanguageModel, decoder: Decoder, page_size: int, *, float8: bool) -> None:
    """Lets a CPU compute in C++ what is possible and right: the tower's attention, and small steps.

    Args:
        page_size: of the steps' pages.
        float8: the KV pool has 8-bit floats, which small steps as a whole do not write.
    """
    use_native_tower(model)
    if float8 or not NativeDecoder.supports(model.language_model):
        return
    try:
        decoder.native = NativeDecoder(model.language_model, page_size)
        reason = disagreement(model, decoder, page_size=page_size)
    except (RuntimeError, OSError) as error:
        reason = str(error)
    if reason:
        decoder.native = None
        _logger.warning("Small steps are not computed in C++, and are slower, since %s.", reason)
    else:
        _logger.info("Steps of up to %d tokens are computed in C++.", MAX_SMALL)


@cache
def _compiled(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> Callable[..., None]:
    library = build("native_decoder.cpp", **heads_of(dtype, dtype, head_dim, group), PAGE_SIZE=page_size)
    function: Callable[..., None] = library.small_step
    function.argtypes, function.restype = (_pointer, _pointer), None  # type: ignore[attr-defined]
    return function


def _linears(layer: Any) -> tuple[PackedLinear | None, ...]:
    """Products of a layer in their order; None for one that is not packed, or not merged."""
    attention, mlp = layer.self_attn, layer.mlp
    output, down = (each if isinstance(each, PackedLinear) else None for each in (attention.o_proj, mlp.down_proj))
    return (
        merged_projections(attention.q_proj, attention.k_proj, attention.v_proj),
        output,
        merged_projections(mlp.gate_proj, mlp.up_proj),
        down,
    )


def _layer(layer: Any, window: int | None) -> _Layer:
    qkv, output, gate_up, down = map(_linear, _linears(layer))
    norms = layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr()
    return _Layer(norms[0], qkv, output, norms[1], gate_up, down, window or 0)


def _linear(packed: PackedLinear | None) -> _Linear:
    assert packed is not None, "supports has looked"
    assert packed.block, "supports has looked"
    bias = None if packed.bias is None else packed.bias.data_ptr()
    return _Linear(packed.address, bias, packed.in_features, packed.block)
