"""The model's own tokenizer: a few hundred sentencepiece pieces, nearly a word each, and bytes for everything else.

python -m training.tokenizer
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from training.cache import RUNS, facts, scene_at
from training.palette import COLOURS, KINDS, PLURALS
from training.prompts import OTHER_SYSTEMS, SYSTEM, SYSTEM_USER
from training.questions import several

PIECES = 640
PATH = RUNS / "tokenizer.model"


def _corpus(scenes: int) -> Iterator[str]:
    for _ in range(scenes):
        yield SYSTEM + " USER: ASSISTANT:"
        yield SYSTEM_USER
    for system in OTHER_SYSTEMS:
        for _ in range(scenes // 10):
            yield system
    # A bar keeps a word from getting the dummy space, as it has none behind a line break or </s>.
    for _ in range(scenes):
        yield "|USER: |Answer"
    for words in (COLOURS, KINDS, PLURALS):
        for word in words:
            for _ in range(scenes // 4):
                yield f"{word} |{word} {word.capitalize()} |{word.capitalize()}"
    rng = np.random.default_rng(31)
    for index in range(scenes):
        # Scenes that no split uses: the tokenizer should not owe its pieces to a test.
        for question in several(facts([scene_at("train", 10_000_000 + index)]), 0, 8, rng):
            for part in question.text.split("\n"):
                yield f"|{part}"
            yield question.answer


def train(path: Path = PATH) -> None:
    """Trains the tokenizer and writes it to `path`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(1500),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        # As in Llama: nothing is normalised away, so that a line break stays one (as a byte).
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        required_chars="".join(chr(c) for c in range(33, 127)),
        character_coverage=1.0,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


if __name__ == "__main__":
    train()
