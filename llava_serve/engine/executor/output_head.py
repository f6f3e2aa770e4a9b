"""A language model's head by itself: logits of hidden states, as the whole model computes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

Head = Callable[[torch.Tensor], torch.Tensor]
"""Logits [tokens, vocabulary] of hidden states [tokens, hidden]."""


@torch.inference_mode()
def output_head(language_model: Any) -> Head:
    """The head of one of transformers' causal language models: its linear layer alone, where that gives the model's
    logits. Some models scale them (Granite, Cohere) or bound them (Gemma 2) behind it: then it is their own forward
    pass over hidden states.
    """
    linear: nn.Module = language_model.get_output_embeddings()
    whole = _ForwardPass(language_model)
    embeddings = language_model.get_input_embeddings().weight
    width = language_model.config.hidden_size
    sample = torch.linspace(-3, 3, 4 * width, dtype=language_model.dtype, device=embeddings.device).view(4, width)
    return linear if torch.equal(linear(sample[None])[0], whole(sample)) else whole


class _ForwardPass:
    """A language model's forward pass from the hidden states on. It has the model's modules, but for the decoder."""

    def __init__(self, language_model: Any) -> None:
        self._model = copy.copy(language_model)
        self._model._modules = {**language_model._modules, language_model.base_model_prefix: _PassThrough()}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class _PassThrough(nn.Module):
    """Stands for a decoder: returns its input."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
