"""Rows of a batch job about small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")


def scene_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Writes pictures of a circle each, and gives a row for each; the answer has the colour `COLOURS[number % 4]`."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        image = Image.new("RGB", (112, 112), "white")
        at = 20 + number % 30
        ImageDraw.Draw(image).ellipse((at, at, at + 40, at + 40), fill=COLOURS[number % len(COLOURS)])
        image.save(folder / f"{number}.png")
        rows.append({"id": number, "image": f"{number}.png", "question": "What colour is the circle?"})
    return rows
