"""Stage 1: the vision tower alone, on targets at every patch.

python -m training.vision --minutes 35
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training import targets
from training.cache import RUNS, Cache, Facts
from training.loop import Options, train
from training.model import VISION_WIDTH, patch_features, vision_tower
from training.pixels import normalise

FOLDER = RUNS / "vision"


class VisionTask:
    """The vision tower under a linear head of `targets.OUTPUTS` per patch."""

    def __init__(self, cache: Path, batch: int, rate: float) -> None:
        self.batch, self._rate = batch, rate
        self.tower = vision_tower()
        # Its output is never used (LLaVA takes the layer before), so it would only gather weight decay.
        self.tower.post_layernorm.requires_grad_(False)
        self.head = nn.Linear(VISION_WIDTH, targets.OUTPUTS)
        self.module: nn.Module = nn.ModuleDict({"tower": self.tower, "head": self.head})
        self.cache = Cache(cache / "train")
        self.test = Cache(cache / "test")

    def rate(self, name: str) -> float:
        return self._rate

    def loss(self, step: int, rank: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([11, step, rank])
        index = rng.integers(len(self.cache), size=self.batch)
        pixels, facts = self.cache.batch(index, rng.random(self.batch) < 0.5)
        return targets.loss(self._outputs(pixels), targets.targets(facts))

    def check(self) -> dict[str, float]:
        """Share right at the patches of 500 test scenes, and of kinds alone by the shapes' size."""
        index = np.arange(500)
        pixels, facts = self.test.batch(index, np.zeros(500, bool))
        found: dict[str, float] = {}
        with torch.no_grad():
            outputs = torch.cat([self._outputs(pixels[i : i + 50]) for i in range(0, 500, 50)])
            found = targets.loss(outputs, targets.targets(facts))[1]
        return found | _kinds_by_size(outputs, facts)

    def _outputs(self, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> torch.Tensor:
        images = normalise(torch.from_numpy(pixels))
        with torch.autocast("cpu", torch.bfloat16):
            outputs: torch.Tensor = self.head(patch_features(self.tower, images))
        return outputs


def _kinds_by_size(outputs: torch.Tensor, facts: Facts) -> dict[str, float]:
    """Share of shapes whose kind is right at the patch of their centre, by size in pixels of the tower."""
    column, row = (np.minimum((facts.box[..., axis] * targets.GRID).astype(int), targets.GRID - 1) for axis in (0, 1))
    patch = row * targets.GRID + column
    kinds = outputs[..., 4 : 4 + dict(targets.CHOICES)["kind"]].argmax(-1).numpy()
    right = np.take_along_axis(kinds, patch, axis=1) == facts.kind
    present, pixels = facts.kind >= 0, facts.box[..., 2] * 160
    found = {}
    for low, high in ((0, 18), (18, 26), (26, 40), (40, 160)):
        chosen = present & (pixels >= low) & (pixels < high)
        found[f"centre_{low}_{high}px"] = float(right[chosen].mean())
    return found


def main() -> None:
    """Trains stage 1, or goes on with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--batch", type=int, default=24, help="scenes per process and step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=RUNS / "cache")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    make = partial(VisionTask, options.cache, options.batch, options.rate)
    train(make, Options(options.folder, options.minutes, options.processes))


if __name__ == "__main__":
    main()
