"""What stage 1 asks of every patch: the shape it lies on, and where that shape stands among the others.

The facts about order, neighbours and numbers are there so that the language model later only has to read them off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from training.cache import Facts
from training.palette import COLOURS, KINDS
from training.relations import DIRECTIONS, beside, only_neighbour
from training.scenes import MAX_SHAPES

GRID = 10
IGNORE = -100

# Name and number of classes of every target that is a choice, in the order of the head's outputs.
CHOICES: tuple[tuple[str, int], ...] = (
    ("kind", len(KINDS)),
    ("colour", len(COLOURS)),
    ("same_kind", MAX_SHAPES + 1),
    ("same_colour", MAX_SHAPES + 1),
    ("all", MAX_SHAPES + 1),
    *((f"shapes_{direction}", MAX_SHAPES) for direction in DIRECTIONS),
    *((f"kind_{direction}", len(KINDS)) for direction in DIRECTIONS),
    *((f"colour_{direction}", len(COLOURS)) for direction in DIRECTIONS),
)
OUTPUTS = 1 + 3 + sum(classes for _, classes in CHOICES)
_WEIGHTS = {"kind": 2.0, "all": 0.5, "same_kind": 0.5, "same_colour": 0.5}
_RELATION_WEIGHT = 0.25


@dataclass(frozen=True)
class Targets:
    """Targets of a batch: `foreground` and `box` per patch, and a class or `IGNORE` per patch for every choice.

    foreground [b, 100] float, box [b, 100, 3] float, choices[name] [b, 100] int64.
    """

    foreground: torch.Tensor
    box: torch.Tensor
    choices: dict[str, torch.Tensor]


def owners(facts: Facts) -> NDArray[np.int64]:
    """Which shape each patch belongs to, or -1: [b, 100].

    A patch belongs to a shape if its centre lies in the shape's box, or if the shape's centre lies in the patch.
    """
    centre = (np.arange(GRID) + 0.5) / GRID
    x, y = np.tile(centre, GRID), np.repeat(centre, GRID)
    dx = np.abs(facts.box[:, :, 0, None] - x)
    dy = np.abs(facts.box[:, :, 1, None] - y)
    apart = np.maximum(dx, dy)
    reach = np.maximum(facts.box[:, :, 2, None] / 2, 0.5 / GRID)
    relative = np.where((facts.kind >= 0)[:, :, None] & (apart <= reach), apart / reach, np.inf)
    nearest = relative.argmin(axis=1)
    return np.where(np.isfinite(relative.min(axis=1)), nearest, -1)


def targets(facts: Facts) -> Targets:
    """The targets of a batch of scenes."""
    present = facts.kind >= 0
    owner = owners(facts)
    inside = owner >= 0
    rows = np.arange(len(owner))[:, None]

    def per_patch(per_shape: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.where(inside, per_shape[rows, owner], IGNORE))

    same_kind = (facts.kind[:, :, None] == facts.kind[:, None, :]) & present[:, None, :]
    same_colour = (facts.colour[:, :, None] == facts.colour[:, None, :]) & present[:, None, :]
    choices = {
        "kind": per_patch(facts.kind),
        "colour": per_patch(facts.colour),
        "same_kind": per_patch(same_kind.sum(axis=2)),
        "same_colour": per_patch(same_colour.sum(axis=2)),
        "all": torch.from_numpy(np.broadcast_to(present.sum(axis=1)[:, None], owner.shape).copy()),
    }
    for direction in DIRECTIONS:
        choices[f"shapes_{direction}"] = per_patch(beside(facts.box, present, direction).sum(axis=2))
        only = only_neighbour(facts.box, present, direction)
        for name, values in (("kind", facts.kind), ("colour", facts.colour)):
            choices[f"{name}_{direction}"] = per_patch(np.where(only >= 0, np.take_along_axis(values, only, 1), IGNORE))
    box = facts.box[rows, owner] * inside[..., None]
    return Targets(torch.from_numpy(inside.astype(np.float32)), torch.from_numpy(box.astype(np.float32)), choices)


def loss(outputs: torch.Tensor, wanted: Targets) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the head's outputs [b, 100, OUTPUTS], and the share right of each choice."""
    outputs = outputs.float()
    total = functional.binary_cross_entropy_with_logits(outputs[..., 0], wanted.foreground)
    inside = wanted.foreground[..., None]
    apart = (outputs[..., 1:4] - wanted.box) * inside
    total = total + 20 * apart.square().sum() / inside.sum().clamp(min=1)
    figures: dict[str, float] = {}
    start = 4
    for name, classes in CHOICES:
        logits, labels = outputs[..., start : start + classes].reshape(-1, classes), wanted.choices[name].reshape(-1)
        start += classes
        known = labels != IGNORE
        if not known.any():
            continue
        logits, labels = logits[known], labels[known]
        total = total + _WEIGHTS.get(name, _RELATION_WEIGHT) * functional.cross_entropy(logits, labels)
        figures[name] = (logits.detach().argmax(1) == labels).float().mean().item()
    return total, figures
