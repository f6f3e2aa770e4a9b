"""Scenes drawn ahead: pixels in a memory-mapped file, and beside it what is in them.

python -m training.cache --scenes 100000
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.drawing import render
from training.palette import COLOURS, KINDS
from training.pixels import IMAGE_SIZE, to_tile
from training.scenes import MAX_SHAPES, Scene, Split, draw_scene

RUNS = Path(__file__).parent / "runs"
# The first word of every generator's seed: no split ever draws from another's stream.
STREAMS: dict[Split, int] = {"train": 1, "test": 2, "held-out": 3}
_SMALL_STREAM = 4
_CHUNK = 500


@dataclass(frozen=True)
class Facts:
    """What is in a batch of scenes: kind and colour [n, 5] (-1 where there is no shape), and boxes [n, 5, 3].

    A box is (x, y, size): the centre and the longer side, as shares of the padded square's side.
    """

    kind: NDArray[np.int64]
    colour: NDArray[np.int64]
    box: NDArray[np.float32]

    def __getitem__(self, index: NDArray[np.int64]) -> Facts:
        return Facts(self.kind[index], self.colour[index], self.box[index])

    def joined(self, other: Facts) -> Facts:
        """These scenes and then the others."""
        return Facts(
            np.concatenate([self.kind, other.kind]),
            np.concatenate([self.colour, other.colour]),
            np.concatenate([self.box, other.box]),
        )

    def mirrored(self) -> Facts:
        """The same scenes with left and right exchanged."""
        box = self.box.copy()
        box[..., 0] = 1 - box[..., 0]
        return Facts(self.kind, self.colour, box)


def facts(scenes: list[Scene]) -> Facts:
    """The scenes' contents, in units of their padded squares."""
    kind = np.full((len(scenes), MAX_SHAPES), -1)
    colour = np.full((len(scenes), MAX_SHAPES), -1)
    box = np.zeros((len(scenes), MAX_SHAPES, 3), np.float32)
    for i, scene in enumerate(scenes):
        side = max(scene.width, scene.height)
        left, top = (side - scene.width) // 2, (side - scene.height) // 2
        for j, shape in enumerate(scene.shapes):
            kind[i, j] = KINDS.index(shape.kind)
            colour[i, j] = COLOURS.index(shape.colour)
            box[i, j] = (shape.x + left) / side, (shape.y + top) / side, shape.size / side
    return Facts(kind, colour, box)


def scene_at(split: Split, index: int) -> Scene:
    """Scene number `index` of a split: always the same one."""
    return draw_scene(np.random.default_rng([STREAMS[split], index]), split)


def small_scene_at(index: int) -> Scene:
    """Scene number `index` of those that train the tower further: three to five small shapes, on no tiny picture."""
    rng = np.random.default_rng([_SMALL_STREAM, index])
    return draw_scene(rng, "train", sides=(120, 480), count=int(rng.integers(3, 6)), small=True)


class Cache:
    """The drawn scenes of a folder, opened for reading: `pixels` uint8 [n, 160, 160, 3] and their `facts`."""

    def __init__(self, folder: Path) -> None:
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        stored = np.load(folder / "facts.npz")
        self.facts = Facts(stored["kind"], stored["colour"], stored["box"])

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: NDArray[np.int64], mirror: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], Facts]:
        """Pixels [n, 160, 160, 3] and facts of these scenes, those of `mirror` [n] seen in a mirror."""
        pixels, found = self.pixels[index], self.facts[index]
        pixels[mirror] = pixels[mirror][:, :, ::-1]
        flipped = found.mirrored()
        return pixels, Facts(found.kind, found.colour, np.where(mirror[:, None, None], flipped.box, found.box))


def _draw_chunk(job: tuple[str, Callable[[int], Scene], int, int]) -> Facts:
    path, draw, start, stop = job
    scenes = [draw(i) for i in range(start, stop)]
    pixels = np.load(path, mmap_mode="r+")
    for i, scene in enumerate(scenes, start):
        pixels[i] = to_tile(render(scene))
    return facts(scenes)


def build(folder: Path, draw: Callable[[int], Scene], scenes: int, processes: int = 2) -> Cache:
    """Draws scenes 0, 1, 2 ... into a folder, unless they are there already."""
    if (folder / "facts.npz").exists():
        cache = Cache(folder)
        if len(cache) == scenes:
            return cache
        (folder / "facts.npz").unlink()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pixels.npy"
    shape = (scenes, IMAGE_SIZE, IMAGE_SIZE, 3)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    jobs = [(str(path), draw, i, min(i + _CHUNK, scenes)) for i in range(0, scenes, _CHUNK)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = list(pool.imap(_draw_chunk, jobs))
    kind, colour, box = (np.concatenate([getattr(part, name) for part in parts]) for name in ("kind", "colour", "box"))
    np.savez(folder / "facts.npz", kind=kind, colour=colour, box=box)  # last: its presence says the cache is whole
    return Cache(folder)


def main() -> None:
    """Draws the caches of both training stages and of their monitoring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--small-scenes", type=int, default=30_000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    build(RUNS / "cache" / "train", partial(scene_at, "train"), options.scenes, options.processes)
    build(RUNS / "cache" / "small", small_scene_at, options.small_scenes, options.processes)
    build(RUNS / "cache" / "test", partial(scene_at, "test"), 1000, options.processes)


if __name__ == "__main__":
    main()
