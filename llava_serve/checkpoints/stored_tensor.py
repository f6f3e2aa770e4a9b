"""A tensor of a checkpoint that is not read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from llava_serve.checkpoints.lora import Delta


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        file: that holds it.
        name: that the file gives it.
        shape: its shape.
        read: gives the tensor in its stored precision, backed by the mapped file where the format allows.
        delta: a LoRA's addition to it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    delta: Delta | None = None

    def value(self) -> Tensor:
        """The tensor in its stored precision, with a LoRA's addition."""
        return self.read() if self.delta is None else self.delta.add_to(self.read())

    def first_rows(self, count: int) -> StoredTensor:
        """The first rows of the tensor."""
        return replace(self, shape=(count, *self.shape[1:]), read=lambda: self.value()[:count], delta=None)

    def replaced_at(self, ids: tuple[int, ...], values: StoredTensor) -> StoredTensor:
        """The tensor with other vectors at some places of its first axis."""

        def read() -> Tensor:
            table = self.value().clone()
            table[list(ids)] = values.value().to(table.dtype)
            return table

        return replace(self, read=read, delta=None)
