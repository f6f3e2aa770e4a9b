"""A checkpoint in transformers' own hands, and conversations for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from support.tiny_hf import Tiny, processor_classes

Talk = list[dict[str, Any]]


def said(role: str, text: str, *images: Image.Image) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


class Reference:
    """A checkpoint in transformers' own hands."""

    def __init__(self, folder: Path, tiny: Tiny) -> None:
        processor, images = processor_classes(tiny)
        self.processor = processor.from_pretrained(
            folder, image_processor=images.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder)
        )
        assert type(self.processor.image_processor) is images
        self.model, notes = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not notes["missing_keys"]
        assert not notes["unexpected_keys"]
        self.model.eval()

    def inputs(self, talk: Talk) -> Any:
        return self.processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def tiles_per_image(self, talk: Talk) -> list[int]:
        """transformers pads the tiles of several pictures to one number."""
        pictures = [part["image"] for message in talk for part in message["content"] if part["type"] == "image"]
        if len(pictures) > 1 and self.model.config.model_type == "llava_onevision":
            return [1] * len(pictures)
        return [len(self.processor.image_processor(one)["pixel_values"][0]) for one in pictures]
