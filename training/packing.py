"""Several questions about one picture in one sequence, none of which sees another.

A sequence starts with what all share (system prompt and picture); each question with its answer is a block that attends
to that start and to itself, with positions that go on from the start's end: exactly what it would be alone. Blocks are
put into bins of equal size, see `training.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from training.cache import Facts
from training.prompts import IMAGE, Text, system_prompt
from training.questions import Question, ask, several
from training.scenes import MAX_SHAPES
from training.targets import GRID

_PATCHES = GRID * GRID
# Tokens of a bin: no block of one or two questions is longer.
_BIN = 96
# Bins of a sequence. Training asks a few questions more than these hold, so that hardly any room is left over.
_BINS = 5
# The shared part is padded to a multiple of this, so that the matrix products keep friendly sizes.
_MULTIPLE = 8


@dataclass(frozen=True)
class Block:
    """A piece of a sequence: token ids (`IMAGE` for a patch), the loss's weight of each, and the shapes it looks at."""

    ids: list[int]
    weights: list[float]
    looks: list[tuple[int, ...]]


@dataclass(frozen=True)
class Sequence:
    """One example: what all its questions share, and a block for each of them."""

    shared: Block
    blocks: list[Block]


@dataclass(frozen=True)
class Batch:
    """Padded sequences: ids, weights (0 where nothing is learned), positions [b, n], and the bins' additive mask.

    n is p + bins * s; the mask is [b, 1, bins * s, p + s]. `looks` [b, bins * s, 5] says which shapes a token in a bin
    should look at to say the next one.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    looks: torch.Tensor


def packed(text: Text, questions: list[Question], system: str, two_turns: int) -> Sequence:
    """Questions after the picture, a block each; the first `two_turns` blocks hold two, one after the other."""
    ids = [*text.before_image(system), *[IMAGE] * _PATCHES]
    singles = len(questions) - 2 * two_turns
    turns = [questions[i : i + 2] for i in range(singles, len(questions), 2)]
    turns += [[q] for q in questions[:singles]]
    return Sequence(Block(ids, [0.0] * len(ids), []), [_block(text, t) for t in turns])


def _block(text: Text, turns: list[Question]) -> Block:
    ids: list[int] = []
    weights: list[float] = []
    looks: list[tuple[int, ...]] = []
    for turn, question in enumerate(turns):
        asked = text.next_question(question.text) if turn else text.first_question(question.text)
        answer = text.answer(question.answer)
        if len(ids) + len(asked) + len(answer) > _BIN:
            break
        ids += [*asked, *answer]
        weights += [0.0] * len(asked) + _weights(answer)
        # One token earlier: where a token is predicted, not where it stands.
        looks += [()] * (len(asked) - 1) + _looks(text, question, len(answer)) + [()]
    return Block(ids, weights, looks)


def _looks(text: Text, question: Question, length: int) -> list[tuple[int, ...]]:
    """The shapes to look at for each token of the answer; in a description, one after the other."""
    if question.kind != "describe":
        return [question.about] * length
    looks: list[tuple[int, ...]] = []
    end = 0
    for i in question.about:
        # A name ends where its kind does, before a comma, "and" or "in".
        end = min(at for mark in (", ", " and ", " in the") if (at := question.answer.find(mark, end + 1)) > 0)
        looks += [(i,)] * (len(text.chunk(question.answer[:end])) - len(looks))
    return looks + [()] * (length - len(looks))


def _weights(answer: list[int]) -> list[float]:
    # Between "each token counts alike" and "each answer counts alike": a description must not outweigh all else.
    return [len(answer) ** -0.5] * len(answer)


def question_first(text: Text, question: Question, system: str) -> Sequence:
    """The picture after its question, as clients send it that put the text part first."""
    before, behind = text.question_first(system, question.text)
    answer = text.answer(question.answer)
    ids = [*before, *[IMAGE] * _PATCHES, *behind, *answer]
    return Sequence(Block(ids, [0.0] * (len(ids) - len(answer)) + _weights(answer), []), [])


def sequences(text: Text, facts: Facts, questions: int, rng: np.random.Generator) -> list[Sequence]:
    """Training sequences of a batch of scenes."""
    return [
        packed(text, several(facts, i, questions, rng), system_prompt(rng), two_turns=2 if rng.random() < 0.5 else 0)
        for i in range(len(facts.kind))
    ]


def sequences_question_first(text: Text, facts: Facts, rng: np.random.Generator) -> list[Sequence]:
    """Training sequences of a batch of scenes with the question before the picture: one question each."""
    return [question_first(text, several(facts, i, 1, rng)[0], system_prompt(rng)) for i in range(len(facts.kind))]


def collate(items: list[Sequence]) -> Batch:
    """Sequences of unequal length as one batch."""
    p = max(len(item.shared.ids) for item in items)
    p += -p % _MULTIPLE
    binned = [_bins(item.blocks) for item in items]
    bins = max(len(b) for b in binned)
    n = p + bins * _BIN
    ids = np.zeros((len(items), n), np.int64)
    weights = np.zeros((len(items), n), np.float32)
    positions = np.zeros((len(items), n), np.int64)
    looks = np.zeros((len(items), bins * _BIN, MAX_SHAPES), bool)
    owner = np.full((len(items), bins, _BIN), -1)
    shared = np.zeros((len(items), p), bool)
    for row, (item, of_item) in enumerate(zip(items, binned, strict=True)):
        start = len(item.shared.ids)
        ids[row, :start], weights[row, :start] = item.shared.ids, item.shared.weights
        positions[row, :start] = np.arange(start)
        shared[row, :start] = True
        for number, blocks in enumerate(of_item):
            at = 0
            for which, block in enumerate(blocks):
                size = len(block.ids)
                place = slice(p + number * _BIN + at, p + number * _BIN + at + size)
                ids[row, place], weights[row, place] = block.ids, block.weights
                positions[row, place] = np.arange(start, start + size)
                for token, shapes in enumerate(block.looks):
                    looks[row, number * _BIN + at + token, list(shapes)] = True
                owner[row, number, at : at + size] = which
                at += size
    own = (owner[..., :, None] == owner[..., None, :]) & np.tril(np.ones((_BIN, _BIN), bool))
    seen = np.concatenate([np.broadcast_to(shared[:, None, None], (*own.shape[:3], p)), own], axis=3)
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(
        torch.from_numpy(~seen), torch.finfo(torch.bfloat16).min
    )
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(weights),
        torch.from_numpy(positions),
        mask.view(len(items), 1, bins * _BIN, p + _BIN),
        torch.from_numpy(looks),
    )


def _bins(blocks: list[Block]) -> list[list[Block]]:
    """The blocks in at most `_BINS` bins, each in the first that has room; what fits nowhere is left out."""
    bins: list[list[Block]] = []
    for block in blocks:
        for other in bins:
            if sum(len(b.ids) for b in other) + len(block.ids) <= _BIN:
                other.append(block)
                break
        else:
            if len(bins) < _BINS:
                bins.append([block])
    return bins


def exam(facts: Facts, rng: np.random.Generator, kinds: list[str], each: int) -> list[tuple[int, Question]]:
    """`each` questions of every kind, with the number of the scene that each is about."""
    found: list[tuple[int, Question]] = []
    for kind in kinds:
        count = 0
        while count < each:
            index = int(rng.integers(len(facts.kind)))
            question = ask(facts, index, kind, rng)
            if question is not None:
                found.append((index, question))
                count += 1
    return found
