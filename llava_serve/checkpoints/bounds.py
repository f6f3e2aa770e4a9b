"""Bounds of what a checkpoint's files say, looked at before any memory is asked for by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from llava_serve.errors import CheckpointError

FILE_BYTES = {".json": 32 << 20, ".jinja": 1 << 20, ".model": 64 << 20}
"""By the end of a name. An index of the largest models takes a few MiB."""
TOKENIZER_BYTES = 128 << 20
"""Of `tokenizer.json`; 262,144 tokens take 33 MiB."""

_CHECKED = frozenset({"config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"})
_MAX_DEPTH = 32
_MAX_PATCHES = 65_536
_MAX_CANVASES = 1000
_SHOWN = 100
"""Characters of a wrong value that a message repeats."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """Of a number, or of each in a list. None is as good as absent."""

    least: float
    greatest: float
    kind: Any = Integral

    def holds(self, value: Any) -> bool:
        if isinstance(value, list):
            return all(not isinstance(each, list) and self.holds(each) for each in value)
        number = isinstance(value, self.kind) and not isinstance(value, bool)
        return value is None or (number and self.least <= value <= self.greatest)  # NaN is not

    def __str__(self) -> str:
        if self.kind is Integral:
            return f"a whole number between {self.least:,} and {self.greatest:,}"
        return f"a number between {self.least:g} and {self.greatest:g}"


class _Flag:
    """Of what is true or false: a text would be true, whatever it says. None is as good as absent."""

    def holds(self, value: Any) -> bool:
        return value is None or isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


_WIDTH = _Bound(1, 1 << 18)
_LAYERS = _Bound(1, 512)
_HEADS = _Bound(1, 4096)
_POSITIONS = _Bound(1, 1 << 24)
_SIDE = _Bound(1, 8192)
_FACTOR = _Bound(1e-15, 1e12, Real)
_BOUNDS: dict[str, _Bound | _Flag] = {
    **dict.fromkeys(("tie_word_embeddings", "multimodal_projector_bias", "unfreeze_mm_vision_tower"), _Flag()),
    **dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token", "use_rslora"), _Flag()),
    **dict.fromkeys(("do_resize", "do_center_crop", "do_pad", "do_normalize", "do_rescale"), _Flag()),
    **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "moe_intermediate_size", "projection_dim"), _WIDTH),
    **dict.fromkeys(("shared_expert_intermediate_size", "mm_hidden_size"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), _LAYERS),
    **dict.fromkeys(("decoder_sparse_step", "sliding_window_pattern"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "head_dim"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "expansion_ratio"), _HEADS),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), _POSITIONS),
    "sliding_window": _Bound(0, 1 << 24),
    "original_max_position_embeddings": _POSITIONS,
    **dict.fromkeys(("image_size", "patch_size", "shortest_edge", "height", "width", "size", "crop_size"), _SIDE),
    **dict.fromkeys(("rope_theta", "factor", "rms_norm_eps", "layer_norm_eps", "image_std", "rescale_factor"), _FACTOR),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), _FACTOR),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"), _FACTOR),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "rope_local_base_freq"), _FACTOR),
    **dict.fromkeys(("projector_layernorm_eps", "layer_norm_epsilon", "norm_epsilon"), _FACTOR),
    **dict.fromkeys(("mm_vision_select_layer", "vision_feature_layer", "vision_feature_layers"), _Bound(-512, 512)),
    "partial_rotary_factor": _Bound(1e-3, 1, Real),
    "vocab_size": _Bound(1, 1 << 22),
    "image_mean": _Bound(-1e9, 1e9, Real),
    "resample": _Bound(0, 5),
    "r": _WIDTH,
    "lora_alpha": _Bound(0, 1e9, Real),
}
"""By the key, wherever it stands: largest where a model is known that comes near it."""


def check_size(path: Path) -> None:
    """Raises `CheckpointError` for a file that is larger than any of its kind; an absent one passes."""
    most = TOKENIZER_BYTES if path.name == "tokenizer.json" else FILE_BYTES[path.suffix]
    if path.is_file() and (size := path.stat().st_size) > most:
        raise CheckpointError(
            f"{path.name} in {path.parent} takes {size:,} bytes, and at most {most:,} are read; compare it with the "
            "published one."
        )


def check_values(name: str, folder: Path, content: dict[str, Any]) -> None:
    """Checks the sizes and numbers in one of a checkpoint's JSON files. Keys that are not known here pass.

    Raises:
        CheckpointError: names the file, the key, its value and what it must be.
    """
    if name not in _CHECKED:
        return

    def refuse(key: str, value: Any, rule: str) -> None:
        shown = str(value)[:_SHOWN]
        raise CheckpointError(
            f"{name} in {folder} has {key} {shown!r}, which must be {rule}; compare it with the published one."
        )

    for path, part in _objects(name, folder, content):
        for key, value in part.items():
            bound = _BOUNDS.get(key)
            if bound is not None and not isinstance(value, dict) and not bound.holds(value):
                refuse(path + key, value, str(bound))
        heads, kv_heads = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
            refuse(path + "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")


def check_tower(vision: dict[str, Any], canvases: tuple[tuple[int, int], ...]) -> None:
    """Checks what a tower's sizes and the canvases of its pictures give together.

    Raises:
        CheckpointError: no patch or too many in a tile, heads that do not share the width, canvases that no model has.
    """
    side, patch, width, heads = (
        int(vision[key]) for key in ("image_size", "patch_size", "hidden_size", "num_attention_heads")
    )
    patches = (side // patch) ** 2
    if not 1 <= patches <= _MAX_PATCHES:
        fault = f"patch_size {patch} and image_size {side}, so {patches:,} patches instead of 1 to {_MAX_PATCHES:,}"
    elif width % heads:
        fault = f"num_attention_heads {heads}, which do not divide hidden_size {width}"
    elif len(canvases) > _MAX_CANVASES or not all(_SIDE.holds(list(canvas)) for canvas in canvases):
        fault = f"image_grid_pinpoints {str(canvases)[:_SHOWN]}, and not at most {_MAX_CANVASES} pairs, each {_SIDE}"
    else:
        return
    raise CheckpointError(f"config.json of the vision tower has {fault}; compare it with the published one.")


def _objects(name: str, folder: Path, content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file, each with the path of its keys. Without recursion, since files choose the depth."""
    found: list[tuple[str, int, Any]] = [("", 0, content)]
    while found:
        path, depth, value = found.pop()
        if depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{name} in {folder} is nested more than {_MAX_DEPTH} levels deep; compare it with the published one."
            )
        if isinstance(value, dict):
            yield path, value
            found += [(f"{path}{key}.", depth + 1, each) for key, each in value.items()]
        elif isinstance(value, list):
            found += [(path, depth + 1, each) for each in value]
