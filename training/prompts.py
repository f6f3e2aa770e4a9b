"""Prompts as token ids, cut and tokenized exactly as the original LLaVA does it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import sentencepiece

BOS, EOS = 1, 2
# Stands for one patch of the picture; no piece of the vocabulary has this id.
IMAGE = -200
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_USER = SYSTEM.replace("human", "user")
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful vision assistant that answers questions about pictures.",
    "Answer the question about the picture.",
)


class Text:
    """The model's sentencepiece tokenizer: chunks of text to ids and back."""

    def __init__(self, model: Path) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.vocabulary: int = self._pieces.vocab_size()
        self.chunk = functools.lru_cache(maxsize=20_000)(self._chunk)

    def _chunk(self, text: str) -> tuple[int, ...]:
        return tuple(self._pieces.encode(text))

    def after_control(self, text: str) -> tuple[int, ...]:
        """Ids of text that follows a control token within its chunk: without the dummy space."""
        # A line break is always a piece of its own, so what follows it is cut as if nothing stood before.
        dummy_and_break = 2
        return tuple(self._pieces.encode("\n" + text)[dummy_and_break:])

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without control tokens."""
        return str(self._pieces.decode([i for i in ids if i > EOS]))

    def before_image(self, system: str) -> list[int]:
        """Everything before the picture."""
        return [BOS, *self.chunk(f"{system} USER: " if system else "USER: ")]

    def first_question(self, question: str) -> list[int]:
        """From behind the picture to where the answer begins."""
        return list(self.chunk(f"\n{question} ASSISTANT:"))

    def answer(self, answer: str) -> list[int]:
        """The answer and its end."""
        return [*self.chunk(answer), EOS]

    def next_question(self, question: str) -> list[int]:
        """From behind an answer's end to where the next answer begins."""
        return list(self.after_control(f"USER: {question} ASSISTANT:"))

    def question_first(self, system: str, question: str) -> tuple[list[int], list[int]]:
        """Ids before and behind a picture that comes after its question."""
        start = f"{system} USER: " if system else "USER: "
        return [BOS, *self.chunk(f"{start}{question}")], list(self.chunk(" ASSISTANT:"))


def system_prompt(rng: np.random.Generator) -> str:
    """The system prompt of one training example: mostly the one the model is served with."""
    draw = rng.random()
    if draw < 0.84:
        return SYSTEM
    if draw < 0.9:
        return SYSTEM_USER
    return ("", *OTHER_SYSTEMS)[int(rng.integers(1 + len(OTHER_SYSTEMS)))]
