"""Detokenized pieces: joined, they are the stripped answer, wherever the chunks end."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest

from llava_serve.checkpoints import open_checkpoint
from llava_serve.text.detokenizer import Detokenizer
from llava_serve.text.tokenizer import Tokenizer, load_tokenizer
from support.paths import CHECKPOINTS

NAMES = ("llava-v1.5-tiny", "llava-v1.6-34b-tiny", "llava-mpt-tiny")


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(open_checkpoint(str(CHECKPOINTS / name)).tokenizer)


class Letters(Tokenizer):
    """Each id is a character."""

    size = 0x110000

    def token_id(self, token: str) -> int | None:
        return ord(token)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def stays_open(self, token_id: int) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def _encode(self, spans: Sequence[object]) -> list[int]:
        raise AssertionError("a detokenizer encodes nothing")


def pieces(text: str, stop: Sequence[str] = ()) -> list[str]:
    """The text letter by letter, and what each letter decides."""
    detokenizer = Detokenizer(Letters(), stop)
    given = [detokenizer.push([ord(letter)]) for letter in text]
    return [*given, detokenizer.push([], last=True)]


@pytest.mark.parametrize("name", NAMES)
def test_random_ids_joined_are_the_stripped_text(name: str) -> None:
    rng = random.Random(name)
    subject = tokenizer(name)
    for _ in range(60):
        ids = [rng.randrange(subject.size) for _ in range(rng.randrange(1, 70))]
        detokenizer = Detokenizer(subject)
        text, at = "", 0
        while at < len(ids):
            step = rng.choice((1, 1, 1, 4))
            text += detokenizer.push(ids[at : at + step])
            at += step
        assert text + detokenizer.push([], last=True) == subject.decode(ids).strip()


def test_a_character_of_several_bytes_comes_whole() -> None:
    subject = tokenizer("llava-v1.5-tiny")
    ids = [token for byte in "né🙂".encode() if (token := subject.token_id(f"<0x{byte:02X}>")) is not None]
    detokenizer = Detokenizer(subject)
    given = [detokenizer.push([token]) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)
    assert "".join(given) + detokenizer.push([], last=True) == "né🙂"


def test_white_space_is_held_back_until_something_follows() -> None:
    assert pieces("  a b \n") == ["", "", "a", "", " b", "", "", ""]


def test_a_stop_string_is_cut_wherever_the_chunks_end() -> None:
    assert "".join(pieces("one END two", ["END"])) == "one"
    assert pieces("aENb", ["END"]) == ["a", "", "", "ENb", ""]


def test_the_earliest_of_several_stop_strings_counts() -> None:
    detokenizer = Detokenizer(Letters(), ["###", "\n\n"])
    assert detokenizer.push([ord(letter) for letter in "a\n\nb###"]) == "a"
    assert detokenizer.stopped
    assert detokenizer.push([ord("c")]) == ""


def test_the_beginning_of_a_stop_string_is_released_at_the_end() -> None:
    assert "".join(pieces("a##", ["###"])) == "a##"


def test_long_answers_are_not_decoded_again_and_again() -> None:
    lengths: list[int] = []

    class Counting(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            lengths.append(len(ids))
            return super().decode(ids)

    detokenizer = Detokenizer(Counting())
    for at in range(5000):
        detokenizer.push([97 + at % 26])
    assert max(lengths) < 50
