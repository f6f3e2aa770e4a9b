"""The names of tensors: those of each layout's files, and this project's, which are those of `Llava`'s modules.

Ours: `vision_tower.*` (transformers' CLIPVisionModel or SiglipVisionModel), `projector_norm.{weight,bias}`,
`projector.N.{weight,bias}`, `image_newline`, and `language_model.*` (transformers' causal language model).
"""

from __future__ import annotations

import re

from llava_serve.checkpoints.spec import CheckpointSpec, Layout

Rules = tuple[tuple[re.Pattern[str], str | None], ...]
"""The first pattern that matches the start of a name decides what replaces the match; None skips the tensor."""


def _rules(*pairs: tuple[str, str | None]) -> Rules:
    return tuple((re.compile(pattern), name) for pattern, name in pairs)


_SKIPPED = (r".*\.(inv_freq|position_ids)$", None)  # tables that older releases of transformers stored

LAYOUTS: dict[Layout, Rules] = {
    "original": _rules(
        _SKIPPED,
        (r"((model|transformer)\.)?mm_projector\.(?=\d)", "projector."),
        (r"((model|transformer)\.)?mm_projector\.", "projector.0."),
        (r"(model|transformer)\.image_newline$", "image_newline"),
        (r"(model|transformer)\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"", "language_model."),
    ),
    "transformers": _rules(
        _SKIPPED,
        (r"(model\.)?multi_modal_projector\.projector_layernorm\.", "projector_norm."),
        (r"(model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
        (r"(model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
        (r"(model\.)?image_newline$", "image_newline"),
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
        (r"(model\.language_model|language_model\.model)\.", "language_model.model."),
    ),
}
TOWER: Rules = _rules(
    _SKIPPED,
    (r"(text_model\.|text_projection|visual_projection|logit_scale|logit_bias)", None),  # the other half
    (r"(vision_model\.)?", "vision_tower."),
)

_STORED_NAMES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "original": (
        ("projector.", "model.mm_projector."),
        ("image_newline", "model.image_newline"),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("language_model.", ""),
    ),
    "transformers": (
        ("projector_norm.", "multi_modal_projector.projector_layernorm."),
        ("projector.0.", "multi_modal_projector.linear_1."),
        ("projector.2.", "multi_modal_projector.linear_2."),
        ("vision_tower.", "vision_tower.vision_model."),
        ("language_model.lm_head.", "language_model.lm_head."),
    ),
}


_WRAPPERS = re.compile(
    r"^(base_model\.model\.|module\.|_forward_module\.)+(?=\w+\.)"
    r"|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What PEFT, data parallelism, Lightning, torch.compile, FSDP and checkpointing of activations put before the names of
the modules that they wrap."""


def our_name(stored: str, rules: Rules) -> str | None:
    """Our name of a stored tensor; the stored one if no rule matches, None if it is skipped."""
    stored = _WRAPPERS.sub("", stored)
    for pattern, replacement in rules:
        match = pattern.match(stored)
        if match:
            return None if replacement is None else replacement + stored[match.end() :]
    return stored


def stored_name(ours: str, spec: CheckpointSpec) -> str:
    """The name that a missing tensor would have in the checkpoint's files, for messages."""
    if spec.tower is not None and not spec.tower_in_checkpoint and ours.startswith("vision_tower."):
        return "vision_model." + ours.removeprefix("vision_tower.")
    name = ours
    for start, stored in _STORED_NAMES[spec.layout]:
        if ours.startswith(start):
            name = stored + ours.removeprefix(start)
            break
    if spec.projector_type == "linear":
        name = name.replace("mm_projector.0.", "mm_projector.")
    return name.replace("model.mm_", "transformer.mm_") if spec.text_config["model_type"] == "mpt" else name
