"""Draws the example pictures of the web page anew:

python -m training.page_examples
"""

from __future__ import annotations

from pathlib import Path

from training.drawing import Look, render
from training.scenes import Scene, Shape

FOLDER = Path(__file__).parents[1] / "llava_serve" / "api" / "page"
_PLAIN = Look(grain=0, blotches=0, jpeg=0, outlined=0)
_PALE = (238, 241, 246)

EXAMPLES = {
    "shapes": Scene(
        320,
        240,
        (
            Shape("star", "yellow", (255, 205, 40), 80, 75, 92),
            Shape("circle", "red", (220, 50, 50), 235, 80, 84),
            Shape("square", "green", (44, 150, 80), 75, 180, 70),
            Shape("triangle", "blue", (50, 90, 215), 235, 180, 84),
        ),
        (_PALE, _PALE),
        seed=3,
    ),
    "night": Scene(
        320,
        240,
        (
            Shape("heart", "pink", (255, 105, 180), 92, 120, 104),
            Shape("star", "yellow", (255, 215, 0), 230, 120, 108),
        ),
        ((24, 26, 44), (38, 34, 66)),
        seed=5,
    ),
}
"""By the name of the file."""


def main() -> None:
    """Writes them."""
    for name, scene in EXAMPLES.items():
        render(scene, _PLAIN).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
