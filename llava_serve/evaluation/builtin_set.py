"""A question set about 20 pictures of coloured shapes, which the model that ships knows.

The pictures are put down by hand with Pillow's own shapes, hard edges and plain colour names. Training's generator
never drew them: they check that the model learned shapes and not its teacher's way of drawing them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

Canvas = ImageDraw.ImageDraw


@dataclass(frozen=True)
class SetFiles:
    """Where a question set lies, in the form that `llava-serve eval exact` takes."""

    questions: Path
    images: Path
    annotations: Path


def write_builtin_set(folder: Path) -> SetFiles:
    """Writes the pictures, the questions and the right answers into a folder."""
    files = SetFiles(folder / "questions.jsonl", folder / "images", folder / "annotations.jsonl")
    files.images.mkdir(parents=True)
    questions, answers = [], []
    for number, made in enumerate(SCENES, 1):
        name = f"{number:02}.png"
        paint(made).save(files.images / name)
        for at, (kind, text, answer) in enumerate(_questions(made), 1):
            key = f"{number:02}-{at:02}"
            questions.append({"question_id": key, "image": name, "text": text})
            answers.append({"question_id": key, "answer": answer, "kind": kind})
    for path, lines in ((files.questions, questions), (files.annotations, answers)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


# Size and ground, then each shape: its colour (and Pillow's name for it, if another), its kind, centre x, y, and size.
_SCENES = """
224x224 white: red circle 112 112 120
224x224 lightgray: blue square 100 120 90
320x240 white: red circle 90 120 90, blue square 230 120 80
320x240 #202020: yellow triangle 160 120 110
640x480 aliceblue: orange star 200 240 180, green cross 460 240 150
640x480 white: pink=hotpink heart 320 230 200
256x256 lightblue: green circle 70 70 70, green=limegreen circle 180 180 80
400x300 #303030: cyan square 90 150 90, red=crimson triangle 300 150 110
300x300 white: black cross 80 80 80, red heart 210 210 100
480x480 #e6e6e6: purple circle 130 130 140, yellow=gold star 340 330 160
640x480 white: red circle 110 240 110, blue square 320 240 110, green triangle 530 240 120
640x480 lightcyan: red square 120 120 110, yellow square 500 130 100, blue=royalblue circle 320 350 130
512x384 #101018: white star 110 100 110, orange=darkorange circle 380 110 100, green=lime square 260 280 100
400x400 lightgray: blue triangle 90 100 90, red triangle 300 90 90, black triangle 200 300 110
360x240 white: orange square 80 120 70, purple=darkviolet square 260 120 80
240x360 white: yellow circle 120 80 90, black circle 120 260 100
640x480 white: red circle 90 90 90, blue circle 540 110 100, green heart 320 230 90, \
yellow=gold star 150 370 130, black square 500 370 90
500x400 lavender: red heart 100 110 100, blue cross 380 110 100, purple star 110 300 120, orange circle 370 300 110
448x336 #404048: white square 90 90 80, red square 350 90 80, cyan cross 110 250 90, pink triangle 330 250 90
256x256 white: green star 128 128 150
"""


@dataclass(frozen=True)
class Made:
    """A picture: its size, a ground by Pillow's name, and shapes as (kind, colour, fill, centre x, centre y, size)."""

    size: tuple[int, int]
    ground: str
    shapes: tuple[tuple[str, str, str, int, int, int], ...]


def _read(line: str) -> Made:
    head, shapes = line.split(": ")
    size, ground = head.split()
    width, height = map(int, size.split("x"))
    found = []
    for shape in shapes.split(", "):
        colour, kind, x, y, across = shape.split()
        name, _, fill = colour.partition("=")
        found.append((kind, name, fill or name, int(x), int(y), int(across)))
    return Made((width, height), ground, tuple(found))


SCENES = tuple(_read(line) for line in _SCENES.strip().splitlines())


def _circle(canvas: Canvas, x: int, y: int, half: float, fill: str) -> None:
    canvas.ellipse([x - half, y - half, x + half, y + half], fill=fill)


def _square(canvas: Canvas, x: int, y: int, half: float, fill: str) -> None:
    canvas.rectangle([x - half, y - half, x + half, y + half], fill=fill)


def _triangle(canvas: Canvas, x: int, y: int, half: float, fill: str) -> None:
    canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)


def _star(canvas: Canvas, x: int, y: int, half: float, fill: str) -> None:
    # Ten corners typed off a sketch on squared paper.
    corners = [
        (0, -100),
        (24, -32),
        (95, -31),
        (38, 12),
        (59, 81),
        (0, 40),
        (-59, 81),
        (-38, 12),
        (-95, -31),
        (-24, -32),
    ]
    canvas.polygon([(x + a * half / 100, y + b * half / 100) for a, b in corners], fill=fill)


def _cross(canvas: Canvas, x: int, y: int, half: float, fill: str) -> None:
    canvas.rectangle([x - half, y - half / 3, x + half, y + half / 3], fill=fill)
    canvas.rectangle([x - half / 3, y - half, x + half / 3, y + half], fill=fill)


def _heart(canvas: Canvas, x: int, y: int, half: float, fill: str) -> None:
    canvas.pieslice([x - half, y - half, x, y], 180, 360, fill=fill)
    canvas.pieslice([x, y - half, x + half, y], 180, 360, fill=fill)
    canvas.polygon([(x - half, y - half / 2), (x + half, y - half / 2), (x, y + half)], fill=fill)


_TOOLS: dict[str, Callable[[Canvas, int, int, float, str], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def paint(made: Made) -> Image.Image:
    """The picture, RGB."""
    image = Image.new("RGB", made.size, made.ground)
    canvas = ImageDraw.Draw(image)
    for kind, _, fill, x, y, size in made.shapes:
        _TOOLS[kind](canvas, x, y, size / 2, fill)
    return image


def _questions(made: Made) -> Iterator[tuple[str, str, str]]:
    """Kind, question and right short answer."""
    kinds = [kind for kind, *_ in made.shapes]
    colours = [colour for _, colour, *_ in made.shapes]
    yield "count", "How many shapes are in the picture?", str(len(kinds))
    for kind, colour in zip(kinds, colours, strict=True):
        if kinds.count(kind) == 1:
            yield "colour", f"What color is the {kind}?", colour
    for kind, colour in zip(kinds, colours, strict=True):
        if colours.count(colour) == 1:
            yield "shape", f"What shape is the {colour} one?", kind
    for kind in _TOOLS:
        yield "presence", f"Is there a {kind} in the picture?", "yes" if kind in kinds else "no"
