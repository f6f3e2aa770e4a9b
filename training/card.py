"""The pictures of the model card: the demo, eight scenes with what the model says about them, and how training went.

python -m training.card
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.cache import RUNS, facts, scene_at
from training.drawing import CLEAN, TRAIN, render
from training.evaluate import Answerer, library_answerer, normalised, training_answerer
from training.export import BUILTIN
from training.phrases import SHORT
from training.questions import WEIGHTS, Question, ask
from training.scenes import Scene, Shape

_DEMO = Scene(
    320,
    240,
    (Shape("circle", "red", (220, 30, 40), 100, 125, 96), Shape("square", "blue", (40, 80, 220), 222, 118, 88)),
    ((255, 255, 255), (255, 255, 255)),
    seed=4,
)
_CELL, _TEXT, _LINE = 260, 150, 17
_INK, _WRONG, _PALE = (30, 30, 30), (190, 30, 30), (225, 225, 225)
_LINES = (
    (214, 39, 40),
    (255, 127, 14),
    (188, 160, 20),
    (44, 160, 44),
    (23, 160, 190),
    (31, 119, 180),
    (148, 103, 189),
    (227, 119, 194),
    (140, 86, 75),
    (0, 0, 0),
    (127, 127, 127),
)


def scenes_sheet(answerer: Answerer, first: int = 40) -> Image.Image:
    """Eight test scenes, two questions each, with the model's answers; a wrong one is red and says what was right."""
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (4 * _CELL, 2 * (_CELL + _TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    kinds = list(WEIGHTS)
    for cell in range(8):
        scene = scene_at("test", first + cell)
        picture = render(scene, TRAIN)
        rng = np.random.default_rng([77, cell])
        asked: list[Question] = []
        while len(asked) < 2:
            question = ask(facts([scene]), 0, kinds[(cell * 2 + len(asked) + int(rng.integers(3))) % len(kinds)], rng)
            if question is not None:
                asked.append(question)
        left, top = cell % 4 * _CELL, cell // 4 * (_CELL + _TEXT)
        small = picture.copy()
        small.thumbnail((_CELL - 16, _CELL - 16), Image.Resampling.BICUBIC)
        sheet.paste(small, (left + (_CELL - small.width) // 2, top + (_CELL - small.height) // 2))
        y = top + _CELL
        for question, answer in zip(asked, answerer([picture] * 2, [q.text for q in asked]), strict=True):
            right = normalised(answer) == normalised(question.answer)
            said = answer if right else f"{answer} (right: {question.answer})"
            for text, ink in ((question.text.replace(SHORT, " (in a word)"), _INK), (said, _INK if right else _WRONG)):
                lines = wrap(f"> {text}" if text is said else text, 36)
                draw.multiline_text((left + 8, y), "\n".join(lines), ink, font, spacing=4)
                y += _LINE * len(lines)
            y += _LINE // 2
    return sheet


def progress_chart(log: Path) -> Image.Image:
    """Exact matches by kind of question over the minutes of stage 2, as its checks found them."""
    points: list[tuple[float, dict[str, float]]] = []
    for line in log.read_text().splitlines():
        found = re.match(r"\s*([\d.]+) min, step \d+, (?:check|end): (.*)", line)
        if found:
            words = found[2].split()
            points.append((float(found[1]), dict(zip(words[::2], map(float, words[1::2]), strict=True))))
    width, height, left, top, right, bottom = 900, 460, 60, 20, 700, 410
    chart = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(chart), ImageFont.load_default(size=14)
    longest = max(minutes for minutes, _ in points)

    def place(minutes: float, share: float) -> tuple[float, float]:
        return left + (right - left) * minutes / longest, bottom - (bottom - top) * share

    for tenth in range(0, 11, 2):
        y = place(0, tenth / 10)[1]
        draw.line([(left, y), (right, y)], _PALE)
        draw.text((left - 8, y), f"{tenth * 10}%", _INK, font, anchor="rm")
    for minutes in range(0, int(longest) + 1, 20):
        draw.text((place(minutes, 0)[0], bottom + 8), str(minutes), _INK, font, anchor="mt")
    draw.text(((left + right) / 2, bottom + 28), "minutes of stage 2 on two shared cores", _INK, font, anchor="mt")
    for number, kind in enumerate(WEIGHTS):
        colour = _LINES[number]
        draw.line([place(m, values[kind]) for m, values in points], colour, width=2)
        y = top + 12 + number * 24
        draw.line([(right + 20, y), (right + 50, y)], colour, width=3)
        draw.text((right + 58, y), f"{kind.replace('_', ' ')} {points[-1][1][kind]:.0%}", _INK, font, anchor="lm")
    return chart


def main() -> None:
    """Writes `demo.png`, `scenes.png` and, where a training log is at hand, `progress.png` beside the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILTIN)
    parser.add_argument("--log", type=Path, default=RUNS / "language" / "log.txt")
    parser.add_argument("--training-decoder", action="store_true", help="answer by training's decoder")
    o = parser.parse_args()
    render(_DEMO, CLEAN).save(o.folder / "demo.png", optimize=True)
    answerer = training_answerer(o.folder) if o.training_decoder else library_answerer(str(o.folder))
    scenes_sheet(answerer).save(o.folder / "scenes.png", optimize=True)
    if o.log.exists():
        progress_chart(o.log).save(o.folder / "progress.png", optimize=True)


if __name__ == "__main__":
    main()
