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

# Layers that transformers' models give the same input: one product instead of three saves most where rows are few.
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


class MergedProjections(nn.Module):
    """Several layers of one input, computed as one product by whichever is called first: their order does not matter.

    The outputs of the others are kept until they are called for the same input, or any is called for another one.
    """

    _inputs: torch.Tensor | None = None
    _outputs: tuple[torch.Tensor, ...] = ()
    _waiting: int = 0

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._packed = PackedLinear(linears)
        self._sizes = [linear.out_features for linear in linears]

    def forward(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] of the layer `index`."""
        if inputs is not self._inputs:
            self._outputs = torch.split_with_sizes(self._packed(inputs), self._sizes, dim=-1)
            self._inputs, self._waiting = inputs, len(self._sizes)
        output = self._outputs[index]
        self._waiting -= 1
        if not self._waiting:
            self._inputs, self._outputs = None, ()
        return output


class _Projection(nn.Module):
    """Stands where one of the merged layers stood."""

    def __init__(self, merged: MergedProjections, index: int) -> None:
        super().__init__()
        self._merged = merged
        self._index = index

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        output: torch.Tensor = self._merged(inputs, self._index)
        return output


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
        for names in _MERGED:
            linears = [child for name in names if plain(child := getattr(module, name, None))]
            if len(linears) == len(names) and len({linear.bias is None for linear in linears}) == 1:
                merged = MergedProjections(linears)
                for index, name in enumerate(names):
                    setattr(module, name, _Projection(merged, index))
        for name, child in module.named_children():
            if plain(child):
                setattr(module, name, PackedLinear([child]))
