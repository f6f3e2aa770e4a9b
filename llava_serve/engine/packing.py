"""Linear layers laid out once for the CPU's matrix units.

oneDNN multiplies from a blocked layout. A plain `nn.Linear` is brought into it at every call, which for the few rows of
a decode step costs more than the product itself.
"""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept in oneDNN's own layout: for inference on a CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return product


def pack_linears(model: nn.Module) -> None:
    """Replaces every plain linear layer of a model, in place, where oneDNN has a layout for its precision."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    packable = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # not on processors without AVX-512
        packable.add(torch.bfloat16)
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype in packable:
                setattr(module, name, PackedLinear(child))
