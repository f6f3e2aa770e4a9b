"""The tokens of log-probabilities as parts of the content: joined they are the content, streamed and not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from llava_serve.api.logprobs import ContentLogprobs
from llava_serve.types import TokenLogprob


def token(piece: str | bytes) -> TokenLogprob:
    data = piece.encode() if isinstance(piece, str) else piece
    text = data.decode(errors="replace")
    return TokenLogprob(0, text, -1.0, ((0, text, -1.0),), data, (data,))


def joined(content: str, pieces: Sequence[str | bytes]) -> list[str]:
    """The texts of the tokens that the content has."""
    logprobs = ContentLogprobs().push(content, [token(piece) for piece in pieces], last=True)
    assert logprobs is not None
    return [entry.token for entry in logprobs.content]


@pytest.mark.parametrize(
    ("content", "pieces", "expected"),
    [
        ("The cat", [" The", " cat", "</s>"], ["The", " cat"]),
        ("The cat", [" ", "The", " cat", "\n", "</s>"], ["The", " cat"]),
        ("one ", [" one", " EN", "D"], ["one", " "]),
        (" red.", [" red", ".", "</s>"], [" red", "."]),
        ("a</s>", ["a", "</s>", "</s>"], ["a", "</s>"]),
        ("ab", ["a", "<pad>", "b"], ["a", "b"]),
        ("", ["</s>"], []),
        ("", [" "], []),
    ],
)
def test_tokens_join_to_the_content(content: str, pieces: list[str], expected: list[str]) -> None:
    assert joined(content, pieces) == expected
    assert "".join(expected) == content


def test_a_character_may_take_several_tokens() -> None:
    parts = [bytes([byte]) for byte in "é🙂".encode()]
    logprobs = ContentLogprobs().push("é🙂", [token(part) for part in parts], last=True)
    assert logprobs is not None
    assert [bytes(entry.bytes) for entry in logprobs.content] == parts


def test_bytes_that_are_no_character_do_not_lose_the_rest() -> None:
    assert joined("a\ufffdb", ["a", b"\xff", "b"])[-1] == "b"


def test_the_alternatives_of_the_first_token_have_no_white_space_either() -> None:
    logprobs = ContentLogprobs().push("The", [token(" The")], last=True)
    assert logprobs is not None
    assert logprobs.content[0].top_logprobs[0].token == logprobs.content[0].token == "The"


def test_without_logprobs_there_are_none() -> None:
    assert ContentLogprobs().push("The", None, last=True) is None


@pytest.mark.parametrize("seed", range(50))
def test_a_stream_tells_the_same_however_its_text_is_held_back(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.choice([" a", "b", " ", "é", "\n", " END"]) for _ in range(rng.randrange(1, 20))]
    content = "".join(pieces).strip()[: rng.randrange(1, 25)]
    assigned, texts, sent = ContentLogprobs(), [], 0
    for at, piece in enumerate(pieces):
        last = at == len(pieces) - 1
        generated = len("".join(pieces[: at + 1]).strip())
        upto = len(content) if last else max(sent, min(len(content), generated - rng.randrange(4)))
        logprobs = assigned.push(content[sent:upto], [token(piece)], last=last)
        sent = upto
        assert logprobs is not None
        texts += [entry.token for entry in logprobs.content]
    assert texts == joined(content, pieces)
    assert "".join(texts) == content
