"""Llama's RMS normalisation with a gradient written out: a third of the memory traffic of the step-by-step one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        unit: torch.Tensor = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        unit, scale, weight = ctx.saved_tensors
        gradient = gradient.to(unit.dtype)
        along = gradient * unit
        by_weight = along.flatten(0, -2).sum(dim=0, dtype=torch.float32)
        scaled = gradient * weight.to(unit.dtype)
        mean = (along @ weight.to(unit.dtype)).unsqueeze(-1) / unit.shape[-1]
        return torch.addcmul(scaled, unit, mean, value=-1).mul_(scale), by_weight, None


class RmsNorm(nn.Module):
    """In place of a `LlamaRMSNorm`, with its parameter."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] normalised to a mean square of 1, times the weight."""
        normalised: torch.Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normalised


def replace_norms(decoder: LlamaForCausalLM) -> None:
    """Puts `RmsNorm` in the place of all of a decoder's norms; names and parameters stay the same."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, RmsNorm(child))
