"""Mixtures of experts: files hold the weights of each expert by themselves, transformers' modules hold those of all
experts of a layer in one tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from llava_serve.checkpoints.stored_tensor import StoredTensor
from llava_serve.errors import CheckpointError

_EXPERT = re.compile(r"(?P<layer>.+\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>w[123]|(gate|up|down)_proj)\.weight")
_JOINED = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}
"""The names in transformers, and what follows each other in them: in Mixtral's files and in Qwen's."""


def join_experts(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with those of a layer's experts joined.

    Args:
        tensors: by our names.

    Raises:
        CheckpointError: an expert lacks a part, or is of another shape than the others.
    """
    joined: dict[str, StoredTensor] = {}
    layers: dict[str, dict[tuple[int, str], StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        ours = name.replace(".block_sparse_moe.", ".mlp.")
        if expert := _EXPERT.fullmatch(ours):
            layers[expert["layer"]][int(expert["number"]), expert["part"]] = tensor
        else:
            joined[ours] = tensor
    for layer, experts in layers.items():
        count = 1 + max(number for number, _ in experts)
        for name, parts in _JOINED.items():
            each = [[_part(experts, number, names, layer) for names in parts] for number in range(count)]
            joined[f"{layer}.{name}"] = _join(each)
    return joined


def _part(
    experts: dict[tuple[int, str], StoredTensor], number: int, names: tuple[str, ...], layer: str
) -> StoredTensor:
    found = next((experts[number, name] for name in names if (number, name) in experts), None)
    if found is None:
        raise CheckpointError(
            f"{' or '.join(names)} of expert {number} in {layer} is missing: download the checkpoint again."
        )
    return found


def _join(experts: list[list[StoredTensor]]) -> StoredTensor:
    """One tensor [experts, rows of all parts, columns]."""
    first = experts[0][0]
    for tensor in (tensor for parts in experts for tensor in parts):
        if len(tensor.shape) != 2 or tensor.shape != first.shape:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} is {tensor.shape}, and {first.name} is {first.shape}: take the "
                "weights that belong together."
            )
    shape = (len(experts), len(experts[0]) * first.shape[0], first.shape[1])

    def read() -> Tensor:
        values = torch.empty(shape, dtype=first.read().dtype)
        for i, parts in enumerate(experts):
            values[i] = torch.cat([tensor.value() for tensor in parts])
        return values

    return replace(first, shape=shape, read=read, delta=None)
