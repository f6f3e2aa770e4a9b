"""Linear layers with weights in oneDNN's blocked layout.

oneDNN multiplies from a blocked layout. A plain `nn.Linear` is converted to it at every call, which for the few tokens
of a decode step costs more than the product itself. And oneDNN compiles a kernel for each number of tokens, which costs
more than the product of a prompt: so the number of tokens is padded to one of a few sizes (`padded`).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard
from weakref import WeakValueDictionary

import torch
from torch import nn

_MAX_UNPADDED = 16
"""Largest number of tokens that is not padded."""
_BLOCKS = (64, 48, 32, 16)
"""Outputs of a block of oneDNN's layout, which differs between processors and shapes."""

# Layers that get the same input in transformers' models: one product instead of three saves most where tokens are few.
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def padded(size: int) -> int:
    """The number of tokens to which `size` are padded: a multiple of 16, or of the power of two that adds at most an
    eighth."""
    if size <= _MAX_UNPADDED:
        return size
    unit = max(_MAX_UNPADDED, 1 << (size.bit_length() - 4))
    return -(-size // unit) * unit


class PackedLinear(nn.Module):
    """Linear layers of the same input as one product in oneDNN's layout: for inference on a CPU only.

    torch.compile cannot trace that layout: it traces a custom operator, which finds the layer by a number.

    Args:
        linears: their outputs are concatenated.
    """

    _numbers = itertools.count()

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self._number = next(self._numbers)
        _packed[self._number] = self
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.block = _block(weight.detach(), self._weight)
        """Outputs of a block of the weights at `address`; 0 where they lie otherwise."""
        with_bias = linears[0].bias is not None
        self.bias = torch.cat([linear.bias for linear in linears]).detach() if with_bias else None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """Itself: its weights never change, and a number finds them."""
        return self

    @property
    def address(self) -> int:
        """Of the weights in oneDNN's layout."""
        return int(torch.ops.mkldnn.data_ptr(self._weight))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.compiler.is_compiling():
            traced: torch.Tensor = torch.ops.llava_serve.packed_linear(inputs, self._number, self.out_features)
            return traced
        return self.multiply(inputs)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """`forward` outside of tracing."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self.bias, "none", [], "")
        return product


def _block(weight: torch.Tensor, packed: torch.Tensor) -> int:
    """Outputs of a block in a layout of weights [out_features, in_features]; 0 where it is not that of
    `native_products.h`. Read from the first and the last block, which cost little."""
    outputs, inputs = weight.shape
    together = 4 // weight.element_size()  # inputs whose weights lie side by side
    numbers = torch.ops.mkldnn._nbytes(packed) // weight.element_size()
    stored = (ctypes.c_char * (numbers * weight.element_size())).from_address(torch.ops.mkldnn.data_ptr(packed))
    flat = torch.frombuffer(stored, dtype=weight.dtype)
    for block in _BLOCKS:
        count = -(-outputs // block)
        if numbers == count * block * inputs and inputs % together == 0:
            blocks, own = flat.view(count, inputs // together, block, together), torch.split(weight, block)
            if all(torch.equal(blocks[at].transpose(0, 1).flatten(1)[: len(own[at])], own[at]) for at in (0, -1)):
                return block
    return 0


_packed: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
torch.library.define("llava_serve::packed_linear", "(Tensor inputs, int number, int out_features) -> Tensor")


@torch.library.impl("llava_serve::packed_linear", "CPU")
def _multiply(inputs: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return _packed[number].multiply(inputs)


@torch.library.register_fake("llava_serve::packed_linear")  # type: ignore[untyped-decorator]
def _multiplied(inputs: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], out_features))


class MergedProjections:
    """Projections of the same input (q, k, v; gate, up), computed as one product by the first that is called.

    The outputs of the others are kept until they are called with the same input, or any is called with another one.

    No `nn.Module`: calls and attributes of modules take 2 % of a step of one sequence here.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.packed = PackedLinear(linears)
        self._sizes = [linear.out_features for linear in linears]
        self._inputs: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._remaining = 0

    def project(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] of the layer `index`."""
        if inputs is not self._inputs:
            self._outputs = torch.split_with_sizes(self.packed(inputs), self._sizes, dim=-1)
            self._inputs, self._remaining = inputs, len(self._sizes)
        output = self._outputs[index]
        self._remaining -= 1
        if not self._remaining:
            self._inputs, self._outputs = None, ()
        return output


class _Projection(nn.Module):
    """Takes the place of one of the merged layers."""

    def __init__(self, merged: MergedProjections, index: int) -> None:
        super().__init__()
        self._merged = merged
        self._index = index

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._merged.project(inputs, self._index)


def merged_projections(*layers: nn.Module) -> PackedLinear | None:
    """The product of layers that are computed together; None if they are not."""
    merged = {layer._merged if isinstance(layer, _Projection) else None for layer in layers}
    one = merged.pop()
    return one.packed if one is not None and not merged else None


def pack_linears(model: nn.Module) -> None:
    """Replaces every plain linear layer of a model, in place, where oneDNN has a layout for its precision."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # not on processors without AVX-512
        dtypes.add(torch.bfloat16)

    def packable(module: object) -> TypeGuard[nn.Linear]:
        # quantizers replace the `forward` of a layer
        return type(module) is nn.Linear and module.weight.dtype in dtypes and "forward" not in vars(module)

    for module in model.modules():
        for names in _MERGED:
            linears = [child for name in names if packable(child := getattr(module, name, None))]
            if len(linears) == len(names) and len({linear.bias is None for linear in linears}) == 1:
                merged = MergedProjections(linears)
                for index, name in enumerate(names):
                    setattr(module, name, _Projection(merged, index))
        for name, child in module.named_children():
            if packable(child):
                setattr(module, name, PackedLinear([child]))
