"""Texts beside control tokens, and texts that spell the name of one."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence

from llava_serve.prompts.conversation import Control, Span, Text


def find_marks(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds where each of some names begins, also inside another one; None where there are no names."""
    alternatives = "|".join(map(re.escape, names))
    return re.compile(f"(?={alternatives})") if alternatives else None


def cut_marks(marks: re.Pattern[str] | None, text: str) -> Iterator[str]:
    """Splits a text after the first character of each mark in it, so that no part holds a whole one."""
    start = 0
    for match in marks.finditer(text) if marks else ():
        yield text[start : match.start() + 1]
        start = match.start() + 1
    if start < len(text):
        yield text[start:]


def strip_beside(spans: Sequence[Span], right: Container[str], left: Container[str]) -> list[Span]:
    """The spans without the white space beside some control tokens, which take it away.

    Args:
        spans: of a prompt.
        right: the tokens with nothing to the right of them (`rstrip` in the tokenizer's files).
        left: those with nothing to the left of them (`lstrip`).
    """
    stripped = list(spans)
    for i, span in enumerate(spans):
        if isinstance(span, Control):
            following = stripped[i + 1] if i + 1 < len(spans) else None
            preceding = stripped[i - 1] if i else None
            if span.token in right and isinstance(following, Text):
                stripped[i + 1] = Text(following.text.lstrip())
            if span.token in left and isinstance(preceding, Text):
                stripped[i - 1] = Text(preceding.text.rstrip())
    return stripped
