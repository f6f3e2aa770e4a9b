"""The normalisation of VQA's evaluation, and what the TextVQA evaluator adds to it: what counts as the same answer.

The rules and the word lists are facts about the benchmark (visualqa.org/evaluation.html), its oddities included.
"""

from __future__ import annotations

import re

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Beside the full stop."""

_FULL_STOP = re.compile(r"\.(?!\d)")
_DIGIT_GROUPS = re.compile(r"\d,\d")

_CONTRACTED = """
ain't aren't can't didn't doesn't don't hasn't haven't isn't mustn't needn't oughtn't shan't wasn't weren't won't
couldn't couldn't've hadn't hadn't've mightn't mightn't've shouldn't shouldn't've wouldn't wouldn't've
could've might've must've not've should've would've
he'd he'd've he's she'd've it'd it'd've it'll we'd've we've they'd they'd've they'll they're they've
you'd you'd've you'll you're you've that's there'd there'd've there're there's
how'd how'll how's what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll
ma'am o'clock 'ow's'at 'twas y'all y'all'll y'all'd've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
}
"""From a word that lacks one apostrophe to the word with all of them."""

_CONTRACTIONS["somebody'd"] = "somebodyd"  # as the benchmark has it


def one_line(answer: str) -> str:
    """An answer without line breaks and tabs, and without white space around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def official(answer: str) -> str:
    """The VQA script's form of an answer: lower case, digits for number words up to ten, no articles, no punctuation
    but decimal points, all apostrophes of contractions.

    A mark becomes a space; it vanishes where it stands beside a space, and each does where a comma groups digits.
    """
    plain = text = one_line(answer)
    grouped = _DIGIT_GROUPS.search(text) is not None
    for mark in _PUNCTUATION:
        vanishes = grouped or mark + " " in text or " " + mark in text
        plain = plain.replace(mark, "" if vanishes else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise(answer: str) -> str:
    """The TextVQA evaluator's form, and that in which the original sends its answers to VQAv2's server: as the official
    one, but commas and question marks always vanish, and an `'s` is a word of its own."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return official(text.strip())
