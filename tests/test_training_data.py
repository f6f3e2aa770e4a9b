"""What the builtin model learns from: the same by the same seed, true to its scenes, and free of what is held out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training.cache import STREAMS, facts, scene_at
from training.drawing import CLEAN, JPEG_60, NOISY, TRAIN, render
from training.evaluate import COMBINATIONS, PHRASES, examination, normalised
from training.export import BUILTIN
from training.packing import collate, packed
from training.palette import COLOURS, HELD_OUT, KINDS, distance
from training.phrases import PHRASINGS, SHORT
from training.prompts import SYSTEM, Text
from training.questions import WEIGHTS, Question, ask, several
from training.relations import DIRECTIONS, beside, only_neighbour
from training.scenes import SMALLEST, Scene

SCENES = [scene_at("train", i) for i in range(300)]
FACTS = facts(SCENES)


def questions(count: int = 300) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(5)
    return [(SCENES[i], q) for i in range(count) for q in several(FACTS, i, 6, rng)]


def test_scenes_and_pixels_are_the_same_by_the_same_seed() -> None:
    for split in STREAMS:
        assert scene_at(split, 7) == scene_at(split, 7)
        assert scene_at(split, 7) != scene_at(split, 8)
    assert len({scene_at(split, 7) for split in STREAMS}) == len(STREAMS)
    for look in (TRAIN, CLEAN, JPEG_60, NOISY):
        first, again = render(SCENES[0], look), render(SCENES[0], look)
        assert first.tobytes() == again.tobytes()


def test_questions_are_the_same_by_the_same_seed() -> None:
    assert questions(20) == questions(20)


def test_scenes_keep_what_they_promise() -> None:
    for scene in SCENES:
        shorter, longer = sorted((scene.width, scene.height))
        assert longer <= 2 * shorter + 1
        assert 1 <= len(scene.shapes) <= 5
        for i, shape in enumerate(scene.shapes):
            assert shape.size >= SMALLEST * shorter - 1e-6
            half = shape.size / 2
            assert half <= shape.x <= scene.width - half
            assert half <= shape.y <= scene.height - half
            assert all(distance(shape.rgb, ground) >= 80 for ground in scene.background)
            for other in scene.shapes[:i]:
                apart = max(abs(shape.x - other.x), abs(shape.y - other.y))
                assert apart > (shape.size + other.size) / 2


def test_a_shape_is_drawn_where_and_as_the_scene_says() -> None:
    for scene in SCENES[:60]:
        picture = render(scene, CLEAN)
        for shape in scene.shapes:
            if shape.kind in ("circle", "square", "cross"):  # their centres are filled
                pixel = picture.getpixel((int(shape.x), int(shape.y)))
                assert isinstance(pixel, tuple)
                assert distance((pixel[0], pixel[1], pixel[2]), shape.rgb) < 12


def test_training_never_draws_or_names_a_held_out_combination() -> None:
    for scene in SCENES:
        assert not {(s.colour, s.kind) for s in scene.shapes} & HELD_OUT
    for _, question in questions():
        said = f"{question.text} {question.answer}".lower()
        assert not any(f"{colour} {kind}" in said for colour, kind in HELD_OUT)


def test_held_out_scenes_hold_one_and_are_asked_about_it() -> None:
    for item in examination(COMBINATIONS, each=3, seed=1):
        assert {(s.colour, s.kind) for s in item.scene.shapes} & HELD_OUT


def test_held_out_phrasings_are_never_drawn_in_training() -> None:
    for kind, phrasings in PHRASINGS.items():
        assert phrasings.held_out, kind
        assert not set(phrasings.train) & set(phrasings.held_out)
    trained = {q.text.removesuffix(SHORT).lower() for _, q in questions()}
    asked = {i.question.text.removesuffix(SHORT).lower() for i in examination(PHRASES, each=5, seed=1)}
    assert not trained & asked


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_kind_can_be_asked_and_answered_shortly(kind: str) -> None:
    rng = np.random.default_rng(9)
    found = [q for i in range(200) if (q := ask(FACTS, i, kind, rng))]
    assert len(found) > 20
    short = [q for q in found if q.text.endswith(SHORT)]
    assert bool(short) == (kind != "describe")
    assert all(len(q.answer.split()) <= 5 for q in short)
    assert all(q.answer.endswith(".") for q in found if q not in short)


def test_answers_agree_with_the_scene() -> None:
    numbers = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    judged: Counter[str] = Counter()
    for scene, question in questions():
        names = [f"{s.colour} {s.kind}" for s in scene.shapes]
        answer = normalised(question.answer)
        if question.text.endswith(SHORT):
            if question.kind == "count_all":
                assert answer == str(len(names))
            continue
        judged[question.kind] += 1
        words = answer.split()
        if question.kind == "count_all":
            assert numbers[words[2]] == len(names)
        elif question.kind == "count_kind":
            stem = words[3].removesuffix("s").removesuffix("se") if words[3] != "cross" else "cross"
            assert numbers[words[2]] == sum(s.kind.startswith(stem) for s in scene.shapes)
        elif question.kind == "colour":
            assert any(words[3] == n.split()[0] and words[1] in (n.split()[1], "shape", "object") for n in names)
        elif question.kind == "shape":
            colour = "" if words[1] == "shape" else f"{words[1]} "
            assert any(f"{colour}{words[-1]}" in n for n in names)
        elif question.kind == "absent":
            assert answer.split(" in the picture")[0].removeprefix("there is no ") not in names
        elif question.kind == "presence":
            thing = answer.split(" in the picture")[0].split(" ", 4)[4].removesuffix(" shape")
            assert answer.startswith("yes") == any(thing in (n, *n.split()) for n in names)
        elif question.kind == "describe":
            assert all(name in answer for name in names)
    kinds = ("count_all", "count_kind", "colour", "shape", "absent", "presence", "describe")
    assert min(judged[kind] for kind in kinds) > 10


def test_left_and_right_mean_what_the_boxes_say() -> None:
    present = FACTS.kind >= 0
    for direction in DIRECTIONS:
        axis = 0 if direction in ("left", "right") else 1
        sign = -1 if direction in ("left", "above") else 1
        only = only_neighbour(FACTS.box, present, direction)
        counts = beside(FACTS.box, present, direction).sum(axis=2)
        assert (only >= 0).sum() > 20
        for scene, anchor in zip(*np.nonzero(only >= 0), strict=True):
            there = FACTS.box[scene, only[scene, anchor], axis] * sign
            assert there > FACTS.box[scene, anchor, axis] * sign + 0.04
            assert counts[scene, anchor] == 1


def test_mirrored_scenes_exchange_left_and_right() -> None:
    present = FACTS.kind >= 0
    mirrored = FACTS.mirrored()
    for one, other in (("left", "right"), ("above", "above")):
        a = only_neighbour(FACTS.box, present, one)  # type: ignore[arg-type]
        b = only_neighbour(mirrored.box, present, other)  # type: ignore[arg-type]
        assert np.array_equal(a, b)


def test_packed_blocks_see_the_picture_and_themselves_only() -> None:
    text = Text(BUILTIN / "tokenizer.model")
    batch = collate([packed(text, several(FACTS, 0, 6, np.random.default_rng(1)), SYSTEM, two_turns=1)])
    before = len(text.before_image(SYSTEM)) + 100
    rows, columns = batch.mask.shape[2:]
    shared = batch.ids.shape[1] - rows
    for row in range(rows):
        seen = (batch.mask[0, 0, row] == 0).nonzero().flatten()
        own = seen[seen >= shared]
        if batch.ids[0, shared + row] == 0:
            continue
        # Positions go on behind the shared part as if the block stood alone.
        assert (seen < shared).sum() == before
        assert batch.positions[0, shared + row] == before + len(own) - 1
    assert columns == shared + 96


def test_colours_and_kinds_are_those_of_the_card() -> None:
    assert len(KINDS) >= 6
    assert {"circle", "square", "triangle"} <= set(KINDS)
    assert len(COLOURS) >= 8
    assert {"red", "blue", "green", "yellow"} <= set(COLOURS)
