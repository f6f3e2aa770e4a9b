"""A trained model as an original LLaVA checkpoint, and back.

python -m training.export            # training/runs/language/checkpoint.pt -> llava_serve/builtin
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.cache import RUNS
from training.model import CONTEXT, VISION_WIDTH, Llava
from training.pixels import CLIP_MEAN, CLIP_STD, IMAGE_SIZE

BUILTIN = Path(__file__).parent.parent / "llava_serve" / "builtin"
_TOWER = "model.vision_tower.vision_tower.vision_model."
# Prefixes of this project's module, and what the original calls them.
_NAMES = (("tower.", _TOWER), ("projector.", "model.mm_projector."), ("decoder.model.", "model."))


def _original_name(name: str) -> str | None:
    """The original's name of a parameter of `Llava`; None for the head, which is the embedding once more."""
    for ours, theirs in _NAMES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if name == "decoder.lm_head.weight":
        return None
    raise ValueError(f"no place for {name} in a LLaVA checkpoint")


def _config(llava: Llava) -> dict[str, Any]:
    decoder = llava.decoder.config
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_key_value_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "vocab_size": decoder.vocab_size,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "vision_tower",
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": CONTEXT,
    }


def _vision_config(llava: Llava) -> dict[str, Any]:
    tower = llava.tower.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    more = ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim")
    values = {name: getattr(tower, name) for name in (*names, *more)}
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "torch_dtype": "float16", **values}


_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": CONTEXT,
    "padding_side": "right",
}
_GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False, "max_length": CONTEXT}
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def save(llava: Llava, tokenizer: Path, folder: Path) -> None:
    """Writes the checkpoint; the weights last and in one move, so that a reader never finds half a file."""
    (folder / "vision_tower").mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": _config(llava),
        "generation_config.json": _GENERATION,
        "tokenizer_config.json": _TOKENIZER,
        "special_tokens_map.json": _SPECIAL,
        "vision_tower/config.json": _vision_config(llava),
        "vision_tower/preprocessor_config.json": _PREPROCESSOR,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    tensors = {
        original: parameter.detach().to(torch.float16).contiguous()
        for name, parameter in llava.named_parameters()
        if (original := _original_name(name)) is not None
    }
    partial = folder / "model.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


def load(llava: Llava, folder: Path) -> None:
    """Fills the model from a checkpoint that `save` wrote; every parameter must be there."""
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            original = _original_name(name)
            if original is not None:
                parameter.copy_(tensors.pop(original))
    if tensors:
        raise ValueError(f"{folder} holds more than the model: {sorted(tensors)[:3]}")


def main() -> None:
    """Exports the averaged weights of stage 2's last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "language" / "checkpoint.pt")
    parser.add_argument("--tokenizer", type=Path, default=RUNS / "tokenizer.model")
    parser.add_argument("--folder", type=Path, default=BUILTIN)
    options = parser.parse_args()
    state = torch.load(options.checkpoint, weights_only=True)
    weights = {n.removeprefix("llava."): v for n, v in state["average"].items() if n.startswith("llava.")}
    llava = Llava(weights["decoder.model.embed_tokens.weight"].shape[0])
    llava.load_state_dict(weights)
    save(llava, options.tokenizer, options.folder)
    size = sum(f.stat().st_size for f in options.folder.rglob("*") if f.is_file())
    print(f"{options.folder}: {sum(p.numel() for p in llava.parameters()):,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
