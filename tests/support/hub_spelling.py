"""The spelling of the hub's older repositories, out of what transformers 5 saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoConfig


def rewrite_as_hub(folder: Path, template: str, image_token: str) -> None:
    """Turns what transformers 5 saved into what the hub's older repositories hold: other tensor names, two shards with
    an index, the processor's settings in files of their own, and no key that equals its default."""
    saved = load_file(folder / "model.safetensors")
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in saved.items()}
    (folder / "model.safetensors").unlink()
    middle = len(tensors) // 2
    shards = {
        f"model-0000{i + 1}-of-00002.safetensors": dict(part)
        for i, part in enumerate((list(tensors.items())[:middle], list(tensors.items())[middle:]))
    }
    for name, part in shards.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    rewrite_config(folder)
    rewrite_processor(folder, template, image_token)


def rewrite_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config["torch_dtype"] = "float16"
    config["ignore_index"] = -100
    text, vision = config["text_config"], config["vision_config"]
    for part in (text, vision):
        for key, value in AutoConfig.for_model(part["model_type"]).to_dict().items():
            if key in part and part[key] == value and key != "model_type":
                del part[key]
        part.pop("dtype", None)
        part["torch_dtype"] = "float16"
    rope = text.pop("rope_parameters", {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
    text["_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    write_json(folder / "config.json", config)


def rewrite_processor(folder: Path, template: str, image_token: str) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())
    write_json(folder / "preprocessor_config.json", processor.pop("image_processor"))
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "chat_template.json", {"chat_template": template})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    config |= {"added_tokens_decoder": decoder, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    config |= {"add_bos_token": True, "add_eos_token": False, "image_token": image_token}
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
