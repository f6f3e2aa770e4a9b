"""The three parts of the model, from transformers where it has them: sizes are decided here and nowhere else."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from training import attention
from training.norm import replace_norms
from training.pixels import IMAGE_SIZE

PATCH_SIZE = 16
VISION_WIDTH = 256
WIDTH = 256
CONTEXT = 2048


def vision_tower() -> CLIPVisionModel:
    """The CLIP vision tower, freshly initialised; 100 patches of 16 pixels and a class token."""
    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=VISION_WIDTH,
        attn_implementation=attention.NAME,
    )
    return CLIPVisionModel(config)


def decoder(vocabulary: int) -> LlamaForCausalLM:
    """The Llama decoder, freshly initialised, with input and output embeddings in one."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        attn_implementation=attention.NAME,
    )
    model = LlamaForCausalLM(config)
    replace_norms(model)
    return model


def patch_features(tower: CLIPVisionModel, images: torch.Tensor) -> torch.Tensor:
    """Images [n, 3, 160, 160] to patch features [n, 100, 256]: the last layer, without the class token."""
    features: torch.Tensor = tower(pixel_values=images).last_hidden_state
    return features[:, 1:]


class Llava(nn.Module):
    """Vision tower, projector and decoder, as one module for training."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tower = vision_tower()
        self.projector = nn.Sequential(nn.Linear(VISION_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.decoder = decoder(vocabulary)

    def image_embeddings(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, 160, 160] to decoder inputs [n, 100, 256]."""
        projected: torch.Tensor = self.projector(patch_features(self.tower, images))
        return projected
