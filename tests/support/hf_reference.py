"""A checkpoint in transformers' own hands, and conversations for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from llava_serve.model.llava import Llava
from llava_serve.types import IMAGE_TOKEN_ID, PreparedPrompt
from support.tiny_hf import Tiny, processor_classes
from support.variants import all_logits

Talk = list[dict[str, Any]]
TOLERANCE = 2e-3


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

    def assert_same_ids(self, talk: Talk, prepared: PreparedPrompt) -> None:
        """The prompt's ids are transformers' own."""
        image = self.model.config.image_token_id
        ids = np.where(prepared.token_ids == IMAGE_TOKEN_ID, image, prepared.token_ids)
        assert ids.tolist() == self.inputs(talk)["input_ids"][0].tolist()

    @torch.inference_mode()
    def assert_same_logits(self, talk: Talk, prepared: PreparedPrompt, model: Llava) -> None:
        """The logits of all positions are transformers' own."""
        expected = self.model(**self.inputs(talk)).logits[0]
        # transformers' LLaVA leaves out what some language models do behind their linear layer
        expected = expected / getattr(model.language_model.config, "logits_scaling", 1)
        torch.testing.assert_close(all_logits(model, prepared), expected, atol=TOLERANCE, rtol=0)
