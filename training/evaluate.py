"""The tables of the model card: exact matches of free greedy answers, through the library's own path.

python -m training.evaluate                  # all tables
python -m training.evaluate --each 20 --each-other 10   # quickly and roughly
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from training.cache import STREAMS, facts
from training.drawing import CLEAN, JPEG_60, NOISY, TRAIN, Look, render
from training.palette import HELD_OUT
from training.questions import WEIGHTS, Question, ask
from training.scenes import Scene, Split, draw_scene

# Answers one question about each picture.
Answerer = Callable[[list[Image.Image], list[str]], list[str]]
LONG_DESCRIPTION = "describe, 4 or 5 shapes"
KINDS = (*WEIGHTS, LONG_DESCRIPTION)
_AT_ONCE = 64


@dataclass(frozen=True)
class Condition:
    """One column of a table: from which scenes, how damaged, in which sizes, and how the questions are put."""

    title: str
    split: Split = "test"
    look: Look = TRAIN
    sides: tuple[int, int] | None = None
    held_out_phrases: bool = False


SEEDS = Condition("held-out scenes")
DAMAGED = (
    Condition("JPEG at quality 60", look=JPEG_60),
    Condition("64 to 1600 px, up to 2:1", look=CLEAN, sides=(64, 1600)),
    Condition("noisy backgrounds", look=NOISY),
)
COMBINATIONS = Condition("held-out combinations", split="held-out")
PHRASES = Condition("held-out phrasings", held_out_phrases=True)


@dataclass(frozen=True)
class Item:
    """One question of an examination, under the kind it is counted with."""

    kind: str
    scene: Scene
    question: Question


def examination(condition: Condition, each: int, seed: int) -> list[Item]:
    """`each` questions of every kind, every one about a scene of its own."""
    items: list[Item] = []
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([STREAMS[condition.split], 1_000_000 + seed, number])
        found = 0
        while found < each:
            scene = draw_scene(rng, condition.split, sides=condition.sides)
            long = len(scene.shapes) > 3
            if (kind == LONG_DESCRIPTION and not long) or (kind == "describe" and long):
                continue
            question = ask(
                facts([scene]),
                0,
                "describe" if kind == LONG_DESCRIPTION else kind,
                rng,
                held_out_names=condition.split == "held-out",
                held_out_phrases=condition.held_out_phrases,
            )
            if question is not None and (condition.split != "held-out" or _is_about_held_out(scene, question)):
                items.append(Item(kind, scene, question))
                found += 1
    return items


def _is_about_held_out(scene: Scene, question: Question) -> bool:
    """Whether the question or its answer speaks of a held-out shape; a count of all shapes always does."""
    said = f"{question.text} {question.answer}".lower()
    words = [w for s in scene.shapes if (s.colour, s.kind) in HELD_OUT for w in (s.colour, s.kind)]
    return question.kind == "count_all" or any(word in said for word in words)


def normalised(answer: str) -> str:
    """An answer as it is compared: without case and without the final stop."""
    return answer.strip().lower().removesuffix(".")


def score(condition: Condition, each: int, seed: int, answerer: Answerer, misses: int = 0) -> dict[str, float]:
    """Share of exact matches by kind; prints the first `misses` wrong answers of each kind."""
    items = examination(condition, each, seed)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, len(items), _AT_ONCE):
        some = items[start : start + _AT_ONCE]
        pictures = [render(item.scene, condition.look) for item in some]
        for item, answer in zip(some, answerer(pictures, [item.question.text for item in some]), strict=True):
            good = normalised(answer) == normalised(item.question.answer)
            if not good and right[item.kind].count(False) < misses:
                print(f"  {item.question.text!r}: {answer!r}, not {item.question.answer!r}")
            right[item.kind].append(good)
        print(f"\r{condition.title}: {start + len(some)} of {len(items)}", end="", file=sys.stderr, flush=True)
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def table(columns: dict[str, dict[str, float]], each: int) -> str:
    """Markdown: a row per kind of question, a column per condition; "overall" leaves long descriptions out."""
    lines = [f"| kind of question | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for kind in KINDS:
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(f'{c[kind]:.1%}' for c in columns.values())} |")
    counted = [kind for kind in KINDS if kind != LONG_DESCRIPTION]
    overall = [sum(c[kind] for kind in counted) / len(counted) for c in columns.values()]
    lines.append(f"| **overall** ({each * len(counted):,} questions) | {' | '.join(f'**{o:.1%}**' for o in overall)} |")
    return "\n".join(lines)


def library_answerer(model: str) -> Answerer:
    """Answers through `llava_serve.LLM`, the way everything else in this project answers."""
    from llava_serve import LLM, SamplingParams
    from llava_serve.config import EngineOptions

    # So small a model gains nothing from a second thread, and on a busy machine waits for it most of the time.
    llm = LLM(model, engine=EngineOptions(num_threads=1))
    sampling = SamplingParams(temperature=0, max_new_tokens=64)

    def answer(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        results = llm.generate(questions, images=[[picture] for picture in pictures], sampling=sampling)
        return [result.text for result in results]

    return answer


def training_answerer(folder: Path) -> Answerer:
    """Answers by training's own plain decoder: to compare the two paths."""
    import torch

    from training.decoding import answers
    from training.export import load
    from training.model import Llava
    from training.pixels import normalise, to_tile
    from training.prompts import Text

    text = Text(folder / "tokenizer.model")
    llava = Llava(text.vocabulary).eval()
    load(llava, folder)

    def answer(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        tiles = torch.from_numpy(np.stack([to_tile(picture) for picture in pictures]))
        return answers(llava, text, normalise(tiles), questions)

    return answer


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin", help="builtin, or a checkpoint's folder")
    parser.add_argument("--each", type=int, default=190, help="questions per kind in the first table")
    parser.add_argument("--each-other", type=int, default=60, help="questions per kind in the other tables")
    parser.add_argument("--table", type=int, choices=range(1, 5), help="only this one of the four tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--misses", type=int, default=0, help="wrong answers to print per kind")
    parser.add_argument("--training-decoder", type=Path, help="a checkpoint's folder, answered by training's decoder")
    o = parser.parse_args()
    answerer = training_answerer(o.training_decoder) if o.training_decoder else library_answerer(o.model)
    tables: tuple[tuple[str, tuple[Condition, ...], int], ...] = (
        ("Held-out scenes", (SEEDS,), o.each),
        ("Damaged, scaled and noisy pictures", DAMAGED, o.each_other),
        ("Combinations of colour and shape that training never drew", (COMBINATIONS,), o.each_other),
        ("Phrasings that training never used", (PHRASES,), o.each_other),
    )
    for title, conditions, each in tables if o.table is None else tables[o.table - 1 : o.table]:
        columns = {c.title: score(c, each, o.seed, answerer, o.misses) for c in conditions}
        print(f"\n**{title}**, {each} questions of each kind\n\n{table(columns, each)}", flush=True)


if __name__ == "__main__":
    main()
