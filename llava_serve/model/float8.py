"""Linear layers with weights in 8-bit floats (e4m3), for GPUs that multiply them; a CPU computes the same, slowly.

A weight has one scale for each output channel, and an input one for each token, found as it comes. Source: torch's
`_scaled_mm` with scales by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_serve.errors import CheckpointError

_FLOAT8 = torch.float8_e4m3fn
_MAX = torch.finfo(_FLOAT8).max
_MULTIPLE = 16
"""Of both widths of a layer, for the product on a GPU."""
_CAPABILITY = (8, 9)
"""The first GPUs that have 8-bit floats: Ada and Hopper."""


class Float8Weight(nn.Parameter):
    """A weight that is kept in 8-bit floats. Its type tells how many bytes it will take, while it is on no device."""


class Float8Linear(nn.Module):
    """Takes the place of a linear layer.

    Args:
        linear: on the meta device.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = Float8Weight(linear.weight, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", torch.empty(0), persistent=False)

    def set_weight(self, value: Tensor, device: torch.device) -> None:
        """Quantizes a weight [out_features, in_features]."""
        rounded, scale = to_float8(value.to(device))
        self.weight = Float8Weight(rounded, requires_grad=False)
        self.scale = scale.T

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the precision of the inputs."""
        rounded, scales = to_float8(inputs.flatten(0, -2))
        # by row, a GPU gives bfloat16 only
        product = torch._scaled_mm(rounded, self.weight.T, scale_a=scales, scale_b=self.scale, out_dtype=torch.bfloat16)
        output = product.to(inputs.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*inputs.shape[:-1], -1)


def has_float8(device: torch.device) -> bool:
    """A GPU has 8-bit floats; a CPU emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def to_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of numbers as 8-bit floats, and the scales of the rows in float32 [..., 1]. A row with a number that is not
    finite has no finite one."""
    scale = values.abs().amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny * _MAX) / _MAX
    return (values.float() / scale).clamp(-_MAX, _MAX).to(_FLOAT8), scale


def replace_linears(language_model: Any, device: torch.device) -> None:
    """Replaces the linear layers of a language model, without its head, where their widths are multiples of 16.

    Args:
        language_model: on the meta device.
        device: where its weights go.

    Raises:
        CheckpointError: the GPU cannot multiply 8-bit floats; no layer has such widths.
    """
    if not has_float8(device):
        raise CheckpointError(
            f"{torch.cuda.get_device_name(device)} does not multiply 8-bit floats: GPUs of compute capability 8.9 and "
            "above do. Choose 8bit (--load-8bit)."
        )
    replaced = 0
    for module in list(language_model.base_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not (child.in_features % _MULTIPLE or child.out_features % _MULTIPLE):
                setattr(module, name, Float8Linear(child))
                replaced += 1
    if not replaced:
        raise CheckpointError("The language model has no linear layers that 8-bit floats (quantization: fp8) suit.")
