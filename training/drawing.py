"""Scenes to pixels: anti-aliased shapes over a plain, graded or noisy background, then camera-like damage."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.outlines import outline
from training.scenes import Scene


@dataclass(frozen=True)
class Look:
    """How often a picture is damaged, and how much: shares of pictures, standard deviations in grey levels."""

    grain: float = 0.3
    grain_range: tuple[float, float] = (2, 14)
    blotches: float = 0.2
    blotch_range: tuple[float, float] = (4, 22)
    jpeg: float = 0.5
    jpeg_quality: tuple[int, int] = (50, 95)
    outlined: float = 0.1


TRAIN = Look()
CLEAN = Look(grain=0, blotches=0, jpeg=0)
JPEG_60 = Look(grain=0, blotches=0, jpeg=1, jpeg_quality=(60, 60))
NOISY = Look(grain=1, grain_range=(6, 14), blotches=0.5, blotch_range=(8, 20), jpeg=0)


def render(scene: Scene, look: Look = TRAIN) -> Image.Image:
    """The scene as an RGB picture of its own size; the same scene and look give the same pixels."""
    rng = np.random.default_rng(scene.seed)
    picture = _ground(scene, look, rng)
    for shape in scene.shapes:
        _paint(picture, outline(shape.kind, rng) * shape.size + (shape.x, shape.y), shape.rgb, shape.size, look, rng)
    if rng.random() < look.grain:
        picture = _grain(picture, rng.uniform(*look.grain_range), rng)
    if rng.random() < look.jpeg:
        low, high = look.jpeg_quality
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(low, high + 1)))
        picture = Image.open(buffer).convert("RGB")
    return picture


def _ground(scene: Scene, look: Look, rng: np.random.Generator) -> Image.Image:
    size = (scene.width, scene.height)
    first, second = scene.background
    blotched = rng.random() < look.blotches
    if first == second and not blotched:
        return Image.new("RGB", size, first)
    a, b = np.array(first, float), np.array(second, float)
    tilt = rng.random()
    ramp = np.linspace(0, tilt, 8)[:, None] + np.linspace(0, 1 - tilt, 8)[None, :]
    coarse = a + (b - a) * ramp[..., None]
    if blotched:
        coarse += rng.normal(0, rng.uniform(*look.blotch_range) / 2, size=coarse.shape)
    return Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def _paint(
    picture: Image.Image,
    points: NDArray[np.float64],
    rgb: tuple[int, int, int],
    size: float,
    look: Look,
    rng: np.random.Generator,
) -> None:
    """Fills the polygon (points in pixels) with smooth edges: a mask drawn larger, then averaged down."""
    scale = 4 if size < 150 else 2
    left, top = np.floor(points.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(points.max(axis=0)).astype(int) + 1
    box = (int(right - left), int(bottom - top))
    mask = Image.new("L", (box[0] * scale, box[1] * scale))
    corners = [(float(x), float(y)) for x, y in (points - (left, top)) * scale]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    picture.paste(rgb, (int(left), int(top)), mask.reduce(scale))
    if rng.random() < look.outlined:
        dark = tuple(int(v * 0.35) for v in rgb)
        line = Image.new("L", mask.size)
        ImageDraw.Draw(line).line([*corners, corners[0]], fill=255, width=max(1, round(0.025 * size * scale)))
        picture.paste((dark[0], dark[1], dark[2]), (int(left), int(top)), line.reduce(scale))


@functools.cache
def _noise_bank() -> NDArray[np.int16]:
    """Normal noise of standard deviation 64, [1024, 1024, 3]: drawing it per picture would cost most of the time."""
    return (np.random.default_rng(20).standard_normal((1024, 1024, 3), dtype=np.float32) * 64).astype(np.int16)


def _grain(picture: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    bank = _noise_bank()
    width, height = picture.size
    rows = (int(rng.integers(1024)) + np.arange(height)) % 1024
    columns = (int(rng.integers(1024)) + np.arange(width)) % 1024
    noise = bank[rows[:, None], columns[None, :]] * np.int32(round(deviation * 16)) >> 10
    return Image.fromarray(np.clip(np.asarray(picture, np.int32) + noise, 0, 255).astype(np.uint8))
