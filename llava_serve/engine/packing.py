"""Linear layers laid out once for the CPU's matrix units.

oneDNN multiplies from a blocked layout. A plain `nn.Linear` is brought into it at every call, which for the few rows of
a decode step costs more than the product itself. And it writes a kernel of its own for each number of rows that it
meets, which costs more than the product of a prompt: let there be few numbers of rows, that come again (`padded`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeGuard
from weakref import WeakValueDictionary

import torch
from torch import nn

_EXACT = 16
"""Numbers of rows up to which none are added: there are few of them."""

# Layers that transformers' models give the same input, in the order in which they are called. One product instead of
# three saves most where there are few rows.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def padded(rows: int) -> int:
    """What `rows` are filled up to: a multiple of 16, or of the power of two that adds an eighth at most."""
    if rows <= _EXACT:
        return rows
    unit = max(_EXACT, 1 << (rows.bit_length() - 4))
    return -(-rows // unit) * unit


class PackedLinear(nn.Module):
    """Linear layers of one input, kept in oneDNN's own layout as one product: for inference on a CPU only.

    torch.compile cannot trace that layout: to it, a product is an operation with a number.

    Args:
        linears: their outputs stand one after the other.
    """

    _numbers = itertools.count()

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._out_features = sum(linear.out_features for linear in linears)
        self._number = next(self._numbers)
        _packed[self._number] = self
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        with_bias = linears[0].bias is not None
        self._bias = torch.cat([linear.bias for linear in linears]).detach() if with_bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.compiler.is_compiling():
            traced: torch.Tensor = torch.ops.llava_serve.packed_linear(inputs, self._number, self._out_features)
            return traced
        return self.multiply(inputs)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """`forward` where nothing is traced."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return product


_packed: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
torch.library.define("llava_serve::packed_linear", "(Tensor inputs, int number, int out_features) -> Tensor")


@torch.library.impl("llava_serve::packed_linear", "CPU")
def _multiply(inputs: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return _packed[number].multiply(inputs)


@torch.library.register_fake("llava_serve::packed_linear")  # type: ignore[untyped-decorator]
def _multiplied(inputs: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], out_features))


class _First(nn.Module):
    """The first of several layers that are given the same input one after the other: computes all of them."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._packed = PackedLinear(linears)
        self._sizes = [linear.out_features for linear in linears]
        self.others = [_Later() for _ in linears[1:]]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features of the first]."""
        first, *rest = torch.split_with_sizes(self._packed(inputs), self._sizes, dim=-1)
        for other, product in zip(self.others, rest, strict=True):
            other.inputs, other.product = inputs, product
        return first


class _Later(nn.Module):
    """Hands out what `_First` has computed for it, once, and only for the same input."""

    inputs: torch.Tensor | None = None
    product: torch.Tensor | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        assert inputs is self.inputs, "siblings are called one after the other with the same input"
        assert self.product is not None, "siblings are called one after the other with the same input"
        product, self.inputs, self.product = self.product, None, None
        return product


def pack_linears(model: nn.Module) -> None:
    """Replaces every plain linear layer of a model, in place, where oneDNN has a layout for its precision."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    packable = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # not on processors without AVX-512
        packable.add(torch.bfloat16)

    def plain(module: object) -> TypeGuard[nn.Linear]:
        return type(module) is nn.Linear and module.weight.dtype in packable

    for module in model.modules():
        for names in _SIBLINGS:
            siblings = [child for name in names if plain(child := getattr(module, name, None))]
            if len(siblings) == len(names) and len({sibling.bias is None for sibling in siblings}) == 1:
                first = _First(siblings)
                for name, part in zip(names, [first, *first.others], strict=True):
                    setattr(module, name, part)
        for name, child in module.named_children():
            if plain(child):
                setattr(module, name, PackedLinear([child]))
