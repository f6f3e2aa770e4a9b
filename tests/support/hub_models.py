"""Models that people have, by what their config.json holds: the sizes that each language model was published with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _text(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_QWEN: dict[str, Any] = {"max_position_embeddings": 32768, **_rope(1e6)}
_TIED = {"tie_word_embeddings": True}
_LLAMA_3_1 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
TEXTS = {
    "vicuna-7b": _text("llama", 4096, 11008, 32, 32, 32, vocab_size=32064, max_position_embeddings=4096),
    "vicuna-13b": _text("llama", 5120, 13824, 40, 40, 40, vocab_size=32064, max_position_embeddings=4096),
    "tinyllama": _text("llama", 2048, 5632, 22, 32, 4, vocab_size=32064),
    "mistral-7b": _text("mistral", 4096, 14336, 32, 32, 8, vocab_size=32064, max_position_embeddings=32768),
    "yi-34b": _text("llama", 7168, 20480, 60, 56, 8, vocab_size=64064, max_position_embeddings=4096, **_rope(5e6)),
    "llama-3-8b": _text("llama", 4096, 14336, 32, 32, 8, vocab_size=128320, max_position_embeddings=8192, **_rope(5e5)),
    "llama-3.1-8b": _text(
        "llama", 4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=131072, **_LLAMA_3_1
    ),
    "phi-3-mini": _text("llama", 3072, 8192, 32, 32, 32, vocab_size=32064, max_position_embeddings=4096),
    "gemma-2b": _text("gemma", 2048, 16384, 18, 8, 1, head_dim=256, vocab_size=256064, **_TIED),
    "granite-2b": _text(
        "granite",
        2048,
        8192,
        40,
        32,
        8,
        vocab_size=49156,
        max_position_embeddings=131072,
        attention_multiplier=0.015625,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        **_TIED,
        **_rope(3e5),
    ),
    "qwen1.5-0.5b": _text("qwen2", 1024, 2816, 24, 16, 16, vocab_size=152000, **_TIED, **_QWEN),
    "qwen1.5-7b": _text("qwen2", 4096, 11008, 32, 32, 32, vocab_size=152000, **_QWEN),
    "qwen1.5-72b": _text("qwen2", 8192, 24576, 80, 64, 64, vocab_size=152064, **_QWEN),
    "qwen1.5-110b": _text("qwen2", 8192, 49152, 80, 64, 8, vocab_size=152064, **_QWEN),
    "qwen2-0.5b": _text("qwen2", 896, 4864, 24, 14, 2, vocab_size=152000, **_TIED, **_QWEN),
    "qwen2-7b": _text("qwen2", 3584, 18944, 28, 28, 4, vocab_size=152128, **_QWEN),
    "qwen2-72b": _text("qwen2", 8192, 29568, 80, 64, 8, vocab_size=152128, **_QWEN),
}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24} | {
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304} | {
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_SIGLIP_26 = SIGLIP | {"num_hidden_layers": 26, "vision_use_head": False}
_ALL = {"vision_feature_select_strategy": "full"}
_GRANITE_CANVASES = [
    [384 * rows, 384 * columns] for rows in range(1, 11) for columns in range(1, 11) if 1 < rows * columns <= 10
]
_PAD = {"image_aspect_ratio": "pad"}
_XTUNER = {**_PAD, "unfreeze_mm_vision_tower": True}
PHI_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{{ bos_token + content if loop.first else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Chat templates with the tokens of the published ones, and their order."""
_ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_patch_merge_type": "spatial_unpad",
    "unfreeze_mm_vision_tower": True,
}
_ONEVISION = {
    "model_type": "llava",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
}
_LLAMA, _MISTRAL, _QWEN_CLASS = "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM"


@dataclass(frozen=True)
class HubModel:
    """A model, or several that differ in their weights only.

    Attributes:
        ids: on the hub.
        text: a key of `TEXTS`.
        kind: `model_type` in transformers' layout, the class in the original's.
        tower: its config.
        config: of config.json, beside the parts.
        template: its tokenizer's chat template in the original's layout; None has none.
    """

    ids: tuple[str, ...]
    text: str
    kind: str
    tower: dict[str, Any] = field(default_factory=lambda: CLIP)
    config: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    @property
    def layout(self) -> Literal["original", "transformers"]:
        return "original" if self.kind.endswith("ForCausalLM") else "transformers"


def _hf(kind: str, text: str, *ids: str, tower: dict[str, Any] = CLIP, **config: Any) -> HubModel:
    return HubModel(ids, text, kind, tower, config)


def _original(
    kind: str, text: str, config: dict[str, Any], *ids: str, tower: dict[str, Any] = CLIP, template: str | None = None
) -> HubModel:
    return HubModel(ids, text, kind, tower, config, template)


def _onevision(size: str, *kinds: str) -> HubModel:
    ids = [f"llava-hf/llava-onevision-qwen2-{size}-{kind}-hf" for kind in kinds]
    return _hf("llava_onevision", f"qwen2-{size}", *ids, tower=_SIGLIP_26)


MODELS = (
    _hf("llava", "vicuna-7b", "llava-hf/llava-1.5-7b-hf"),
    _hf("llava", "vicuna-13b", "llava-hf/llava-1.5-13b-hf"),
    _hf("llava", "mistral-7b", "llava-hf/bakLlava-v1-hf"),
    _hf("llava", "tinyllama", "bczhou/tiny-llava-v1-hf"),
    _hf("llava", "phi-3-mini", "xtuner/llava-phi-3-mini-hf"),
    _hf("llava", "llama-3-8b", "xtuner/llava-llama-3-8b-v1_1-transformers", "Intel/llava-llama-3-8b"),
    _hf("llava", "gemma-2b", "Intel/llava-gemma-2b"),
    _hf(
        "llava",
        "llama-3.1-8b",
        "fancyfeast/llama-joycaption-alpha-two-hf-llava",
        "fancyfeast/llama-joycaption-beta-one-hf-llava",
        tower=SIGLIP,
        **_ALL,
    ),
    _hf(
        "llava",
        "qwen1.5-0.5b",
        "llava-hf/llava-interleave-qwen-0.5b-hf",
        tower=_SIGLIP_26,
        vision_feature_layer=-1,
        **_ALL,
    ),
    _hf(
        "llava",
        "qwen1.5-7b",
        "llava-hf/llava-interleave-qwen-7b-hf",
        "llava-hf/llava-interleave-qwen-7b-dpo-hf",
        tower=_SIGLIP_26,
        vision_feature_layer=-1,
        **_ALL,
    ),
    _hf("vipllava", "vicuna-7b", "llava-hf/vip-llava-7b-hf"),
    _hf("vipllava", "vicuna-13b", "llava-hf/vip-llava-13b-hf"),
    _hf("llava_next", "mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf"),
    _hf("llava_next", "vicuna-7b", "llava-hf/llava-v1.6-vicuna-7b-hf"),
    _hf("llava_next", "vicuna-13b", "llava-hf/llava-v1.6-vicuna-13b-hf"),
    _hf("llava_next", "yi-34b", "llava-hf/llava-v1.6-34b-hf"),
    _hf("llava_next", "llama-3-8b", "llava-hf/llama3-llava-next-8b-hf"),
    _hf("llava_next", "qwen1.5-72b", "llava-hf/llava-next-72b-hf"),
    _hf("llava_next", "qwen1.5-110b", "llava-hf/llava-next-110b-hf"),
    _hf(
        "llava_next",
        "granite-2b",
        "ibm-granite/granite-vision-3.1-2b-preview",
        "ibm-granite/granite-vision-3.2-2b",
        "ibm-granite/granite-vision-3.3-2b",
        tower=SIGLIP,
        vision_feature_layer=[-24, -20, -12, -1],
        image_grid_pinpoints=_GRANITE_CANVASES,
        tie_word_embeddings=True,
        **_ALL,
    ),
    _hf("llava_next_video", "vicuna-7b", "llava-hf/LLaVA-NeXT-Video-7B-hf"),
    _hf("llava_next_video", "yi-34b", "llava-hf/LLaVA-NeXT-Video-34B-hf"),
    _onevision("0.5b", "si", "ov"),
    _onevision("7b", "si", "ov", "ov-chat"),
    _onevision("72b", "si", "ov", "ov-chat"),
    _original(_LLAMA, "vicuna-7b", _PAD, "liuhaotian/llava-v1.5-7b", "openbmb/RLAIF-V-7B"),
    _original(_LLAMA, "vicuna-13b", _PAD, "liuhaotian/llava-v1.5-13b"),
    _original("Share4VLlamaForCausalLM", "vicuna-7b", _PAD, "Lin-Chen/ShareGPT4V-7B"),
    _original("Share4VLlamaForCausalLM", "vicuna-13b", _PAD, "Lin-Chen/ShareGPT4V-13B"),
    _original(_LLAMA, "phi-3-mini", _XTUNER, "xtuner/llava-phi-3-mini", template=PHI_3),
    _original(
        _LLAMA,
        "llama-3-8b",
        _XTUNER,
        "xtuner/llava-llama-3-8b-hf",
        "xtuner/llava-llama-3-8b-v1_1-hf",
        template=LLAMA_3,
    ),
    _original(_MISTRAL, "mistral-7b", _PAD, "microsoft/llava-med-v1.5-mistral-7b"),
    _original(_MISTRAL, "mistral-7b", _ANYRES, "liuhaotian/llava-v1.6-mistral-7b"),
    _original(_LLAMA, "vicuna-7b", _ANYRES, "liuhaotian/llava-v1.6-vicuna-7b"),
    _original(_LLAMA, "vicuna-13b", _ANYRES, "liuhaotian/llava-v1.6-vicuna-13b"),
    _original(_LLAMA, "yi-34b", _ANYRES, "liuhaotian/llava-v1.6-34b"),
    _original(_LLAMA, "llama-3-8b", _ANYRES, "lmms-lab/llama3-llava-next-8b"),
    _original(_QWEN_CLASS, "qwen1.5-72b", _ANYRES, "lmms-lab/llava-next-72b"),
    _original(_QWEN_CLASS, "qwen1.5-110b", _ANYRES, "lmms-lab/llava-next-110b"),
    _original(_QWEN_CLASS, "qwen1.5-0.5b", _PAD, "lmms-lab/llava-next-interleave-qwen-0.5b", tower=SIGLIP),
    _original(
        _QWEN_CLASS,
        "qwen1.5-7b",
        _PAD,
        "lmms-lab/llava-next-interleave-qwen-7b",
        "lmms-lab/llava-next-interleave-qwen-7b-dpo",
        tower=SIGLIP,
    ),
    _original(
        _QWEN_CLASS,
        "qwen2-0.5b",
        _ONEVISION,
        "lmms-lab/llava-onevision-qwen2-0.5b-si",
        "lmms-lab/llava-onevision-qwen2-0.5b-ov",
        tower=SIGLIP,
    ),
    _original(
        _QWEN_CLASS,
        "qwen2-7b",
        _ONEVISION,
        "lmms-lab/llava-onevision-qwen2-7b-si",
        "lmms-lab/llava-onevision-qwen2-7b-ov",
        "lmms-lab/llava-onevision-qwen2-7b-ov-chat",
        "lmms-lab/llava-critic-7b",
        "lmms-lab/LLaVA-Video-7B-Qwen2",
        tower=SIGLIP,
    ),
    _original(
        _QWEN_CLASS,
        "qwen2-72b",
        _ONEVISION,
        "lmms-lab/llava-onevision-qwen2-72b-si",
        "lmms-lab/llava-onevision-qwen2-72b-ov-sft",
        "lmms-lab/llava-onevision-qwen2-72b-ov-chat",
        "lmms-lab/llava-critic-72b",
        tower=SIGLIP,
    ),
)
