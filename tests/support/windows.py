"""Language models whose layers have sliding windows, in every spelling that config files have for which ones."""

from __future__ import annotations

from typing import Any, NamedTuple

WINDOW = 9
_SLIDING, _FULL = "sliding_attention", "full_attention"
_TURNS = {"layer_types": [_FULL, _SLIDING, _FULL]}
_QWEN = {"use_sliding_window": True, "max_window_layers": 1}
_SMOL = {"use_sliding_window": True, "no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}


class Windows(NamedTuple):
    """A language model.

    Attributes:
        kind: its `model_type`.
        text: its settings beside the common ones and `sliding_window`.
        layers: the window of each layer.
    """

    kind: str
    text: dict[str, Any]
    layers: tuple[int | None, ...]


def _all(kind: str, **text: Any) -> Windows:
    return Windows(kind, text, (WINDOW,) * 3)


def _none(kind: str, **text: Any) -> Windows:
    return Windows(kind, text, (None,) * 3)


def _turns(kind: str, **text: Any) -> Windows:
    return Windows(kind, {**text, **_TURNS}, (None, WINDOW, None))


MODELS = {
    "cohere2 by default": Windows("cohere2", {}, (WINDOW, WINDOW, WINDOW, None)),
    "cohere2 by a pattern": Windows("cohere2", {"sliding_window_pattern": 2}, (WINDOW, None, WINDOW, None)),
    "cohere2": _turns("cohere2"),
    "exaone4 by default": Windows("exaone4", {}, (WINDOW, WINDOW, WINDOW, None)),
    "exaone4": _turns("exaone4"),
    "gemma3 by default": Windows("gemma3_text", _GEMMA, (WINDOW,) * 5 + (None,)),
    "gemma3 by a pattern": Windows("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}, (WINDOW, None, WINDOW)),
    "gemma3": _turns("gemma3_text", **_GEMMA),
    "llama, which knows none": _none("llama"),
    "ministral": _turns("ministral", head_dim=8),
    "ministral by default": _all("ministral", head_dim=8),
    "ministral3": _all("ministral3", head_dim=8),
    "mistral": _all("mistral"),
    "mixtral": _all("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmo3 by default": Windows("olmo3", {}, (WINDOW, WINDOW, WINDOW, None)),
    "olmo3": _turns("olmo3"),
    "phi3": _all("phi3"),
    "qwen2 from a layer on": Windows("qwen2", _QWEN, (None, WINDOW, WINDOW)),
    "qwen2 from none on": _none("qwen2", use_sliding_window=True, max_window_layers=3),
    "qwen2 without": _none("qwen2", max_window_layers=1),
    "qwen2": _turns("qwen2", **_QWEN),
    "qwen3 from a layer on": Windows("qwen3", {**_QWEN, "head_dim": 16}, (None, WINDOW, WINDOW)),
    "qwen3 without": _none("qwen3", head_dim=16),
    "qwen3": _turns("qwen3", **_QWEN, head_dim=16),
    "qwen2_moe without": _none("qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "qwen3_moe": _all("qwen3_moe", num_experts=4, num_experts_per_tok=2, head_dim=16, **_QWEN),
    "qwen3_moe without": _none("qwen3_moe", num_experts=4, num_experts_per_tok=2, head_dim=16),
    "smollm3 by its positions": Windows("smollm3", _SMOL, (None, WINDOW, None)),
    "smollm3 without": _none("smollm3", no_rope_layers=[1, 0, 1]),
    "starcoder2": _all("starcoder2"),
}
"""By name. One `by default` has as many layers as its class's own pattern."""


def settings(name: str) -> dict[str, Any]:
    """Of the language model's config, beside the common ones."""
    model = MODELS[name]
    return {"sliding_window": WINDOW, **model.text, "num_hidden_layers": len(model.layers)}
