"""One scene as its asker sees it."""

from __future__ import annotations

import numpy as np

from training.cache import Facts
from training.palette import COLOURS, HELD_OUT, KINDS
from training.relations import Direction, beside, only_neighbour

# Two centres closer than this (share of the square's side) have no order that anyone could be held to.
_ORDER = 0.03


class View:
    """The names of a scene's shapes by number, how to speak of each, and who stands where."""

    def __init__(self, facts: Facts, held_out_names: bool) -> None:
        present = facts.kind[0] >= 0
        self.names = [
            (COLOURS[c], KINDS[k]) for c, k in zip(facts.colour[0][present], facts.kind[0][present], strict=True)
        ]
        self.colours = [c for c, _ in self.names]
        self.kinds = [k for _, k in self.names]
        self.box = facts.box[0][present]
        self._facts = facts
        # Training must not speak of held-out combinations either, or it would learn that they never occur.
        self.sayable = [(c, k) for c in COLOURS for k in KINDS if held_out_names or (c, k) not in HELD_OUT]

    def neighbours(self, direction: Direction) -> tuple[list[int], list[int]]:
        """For each shape: the number of shapes in this direction, and the only one there or -1."""
        present = self._facts.kind >= 0
        n = len(self.names)
        counts = beside(self._facts.box, present, direction).sum(axis=2)[0, :n]
        only = only_neighbour(self._facts.box, present, direction)[0, :n]
        return [int(v) for v in counts], [int(v) for v in only]

    def handles(self, i: int) -> list[str]:
        """The ways to speak of shape `i` that fit no other shape."""
        colour, kind = self.names[i]
        found = []
        if self.names.count((colour, kind)) == 1:
            found.append(f"{colour} {kind}")
        if self.kinds.count(kind) == 1:
            found += [kind, kind]
        if self.colours.count(colour) == 1:
            found.append(f"{colour} shape")
        return found

    def order(self) -> list[int] | None:
        """The shapes from left to right, or from top to bottom in a column; None if that is unclear."""
        x, y = self.box[:, 0], self.box[:, 1]
        along = y if len(x) > 1 and np.ptp(x) < 0.01 else x
        order = np.argsort(along)
        if len(order) > 1 and np.diff(along[order]).min() < _ORDER:
            return None
        return [int(i) for i in order]
