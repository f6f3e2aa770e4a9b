"""Detokenized pieces: joined, they are the stripped answer, wherever the chunks end."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from llava_serve.checkpoints import open_checkpoint
from llava_serve.prompts.conversation import Text
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

    def has_text(self, token_id: int) -> bool:
        return True

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
    assert "".join(pieces("one END two", ["END"])) == "one "
    assert pieces("aENb", ["END"]) == ["a", "", "", "ENb", ""]


def spelled(text: str, *, after: str = "", **options: Any) -> str:
    """The answer of these letters, one by one."""
    detokenizer = Detokenizer(Letters(), after=[ord(letter) for letter in after], **options)
    return "".join(detokenizer.push([ord(letter)]) for letter in text) + detokenizer.push([], last=True)


def test_white_space_before_a_stop_string_stays_unless_the_template_ends_there() -> None:
    assert spelled("one \nEND", stop=["END"]) == "one \n"
    assert spelled("one \n###", template_stop=["###"]) == "one"
    assert spelled("one \n###", stop=["###"], template_stop=["###"]) == "one \n"


def test_a_stop_string_may_be_a_part_of_the_answer() -> None:
    assert spelled("one END two", stop=["END", "two"], include_stop=True) == "one END"
    assert spelled("one###", template_stop=["###"], include_stop=True) == "one"


def test_stop_strings_count_after_the_least_number_of_tokens() -> None:
    assert spelled("aXbXcX", stop=["X"], min_tokens=2) == "aXb"
    assert spelled("aXbXcX", stop=["X"], min_tokens=1) == "a"
    assert spelled("aXYbXY", stop=["XY"], min_tokens=2) == "a"  # it ends after them


def test_a_continued_text_keeps_the_white_space_at_its_start() -> None:
    assert spelled(" red. ", after="The circle is") == " red."
    assert spelled(" red. ") == "red."


@pytest.mark.parametrize("name", NAMES)
def test_a_continued_text_and_its_answer_join_as_the_model_wrote_them(name: str) -> None:
    subject = tokenizer(name)
    ids = subject.encode([Text("The circle is red and the square is blue.")])
    for cut in range(3, len(ids)):
        detokenizer = Detokenizer(subject, after=ids[:cut])
        joined = subject.decode(ids[:cut]) + detokenizer.push(ids[cut:], last=True)
        assert joined == subject.decode(ids)


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
