"""A decoder of our own for the Llama family, over the weights that transformers has loaded.

Where transformers starts some forty operations in a layer, it needs four products (queries, keys and values are one,
gate and up another), attention, and four kernels between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from llava_serve.engine.executor.attention import Step
from llava_serve.engine.executor.kernels.selection import LayerShape, current_device, layer_kernels

DEVICES = {"cuda"}
"""Types of devices that use it. On a CPU transformers' decoder runs over layers in oneDNN's layout."""

WINDOWS: dict[type[nn.Module], Callable[[Any], int | None]] = {
    LlamaForCausalLM: lambda attention: None,
    MistralForCausalLM: lambda attention: attention.config.sliding_window,
    Qwen2ForCausalLM: lambda attention: attention.sliding_window,
}
"""The models that it computes, and the window of an attention module of each."""

_Weights = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias of a product."""


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: _Weights
    output: _Weights
    mlp_norm: torch.Tensor
    gate_up: _Weights
    down: _Weights
    window: int | None


_layers: WeakKeyDictionary[nn.Module, list[_Layer]] = WeakKeyDictionary()
"""Of language models whose weights are merged: engines may share one."""


class LlamaDecoder:
    """Computes packed steps of a language model that `supports` names.

    The weights of merged projections become views of the merged ones, so that the model itself computes as before.

    Args:
        float8: the KV pool has 8-bit floats.
    """

    def __init__(self, language_model: Any, *, float8: bool = False) -> None:
        decoder, config = language_model.base_model, language_model.config
        if language_model not in _layers:
            window = WINDOWS[type(language_model)]
            _layers[language_model] = [_layer(layer, window(layer.self_attn)) for layer in decoder.layers]
        self._layers = _layers[language_model]
        self._rotary = decoder.rotary_emb
        self._norm, self._eps = decoder.norm.weight.detach(), config.rms_norm_eps
        attention = decoder.layers[0].self_attn
        self._scaling: float = attention.scaling
        shape = layer_shape(language_model, config.num_key_value_heads, attention.head_dim, float8=float8)
        self._kernels = layer_kernels(shape)

    @staticmethod
    def supports(language_model: Any) -> bool:
        """It is of a known kind, on a device that uses this decoder, and its layers are plain ones."""
        if type(language_model) not in WINDOWS or language_model.device.type not in DEVICES:
            return False
        plain = all(
            type(module) is nn.Linear
            for layer in language_model.base_model.layers
            for part in (layer.self_attn, layer.mlp)
            for name, module in part.named_children()
            if name.endswith("_proj")
        )
        return plain and language_model.config.hidden_act == "silu"

    def forward(self, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of input embeddings [tokens, hidden]."""
        kernels, eps = self._kernels, self._eps
        with current_device(embeddings.device):
            cos, sin = (part[0] for part in self._rotary(embeddings[None], step.positions[None]))
            residual, delta = embeddings.clone(), None
            for index, layer in enumerate(self._layers):
                normed = kernels.add_rmsnorm(delta, residual, layer.input_norm, eps)
                pool = (*step.memory.layers[index], step.memory.scales[index])
                query = kernels.rotate_and_write(linear(normed, *layer.qkv), cos, sin, step.slots, *pool)
                attended = step.attend_stored(index, query.transpose(0, 1)[None], self._scaling, layer.window)
                delta = linear(attended.flatten(2)[0], *layer.output)
                normed = kernels.add_rmsnorm(delta, residual, layer.mlp_norm, eps)
                delta = linear(kernels.silu_mul(linear(normed, *layer.gate_up)), *layer.down)
            return kernels.add_rmsnorm(delta, residual, self._norm, eps)


def layer_shape(language_model: Any, kv_heads: int, head_dim: int, *, float8: bool) -> LayerShape:
    """The sizes of a language model's layers. `float8`: the KV pool has 8-bit floats."""
    config = language_model.config
    return LayerShape(
        config.hidden_size,
        getattr(config, "intermediate_size", 0),
        config.num_attention_heads,
        kv_heads,
        head_dim,
        language_model.dtype,
        language_model.device,
        float8,
    )


def _layer(layer: Any, window: int | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight.detach(),
        _merged((attention.q_proj, attention.k_proj, attention.v_proj)),
        _weights(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        _merged((mlp.gate_proj, mlp.up_proj)),
        _weights(mlp.down_proj),
        window,
    )


def _weights(layer: nn.Linear) -> _Weights:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _merged(layers: Sequence[nn.Linear]) -> _Weights:
    """The weights of several layers below one another. Those of the layers become parts of them, so that the memory is
    taken once."""
    with torch.no_grad():
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    parts = torch.split_with_sizes(weight, [layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    return weight, bias
