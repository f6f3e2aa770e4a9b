"""How questions are put: several phrasings of each kind, some of which training never uses.

`{pic}` is one of several words for the picture, `{colour}` is colour or color; `{a}` names the shape asked about.
A phrasing that is held out uses words that training uses elsewhere, in an order that it never sees.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PICTURE_WORDS = ("picture", "image", "scene", "drawing")
SHORT = "\nAnswer the question using a single word or phrase."


class Phrasings(NamedTuple):
    """Phrasings of one kind of question: those that training draws from, and those that only tests use."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


PHRASINGS: dict[str, Phrasings] = {
    "colour": Phrasings(
        (
            "What colour is the {a}?",
            "What {colour} is the {a}?",
            "What is the {colour} of the {a}?",
            "Which {colour} is the {a}?",
            "Tell me the {colour} of the {a}.",
            "The {a} is what {colour}?",
            "What {colour} is the {a} in the {pic}?",
            "What is the {colour} of the {a} in this {pic}?",
            "Please name the {colour} of the {a}.",
            "What {colour} does the {a} have?",
            "In the {pic}, what {colour} is the {a}?",
        ),
        (
            "Which {colour} does the {a} have?",
            "In this {pic}, what {colour} is the {a}?",
            "Name the {colour} of the {a}.",
        ),
    ),
    "shape": Phrasings(
        (
            "What shape is the {a}?",
            "What is the shape of the {a}?",
            "Which shape is the {a}?",
            "What is the {a}?",
            "Tell me the shape of the {a}.",
            "What shape is the {a} in the {pic}?",
            "What kind of shape is the {a}?",
            "What shape does the {a} have?",
            "What is the shape of the {a} in this {pic}?",
            "Please name the shape of the {a}.",
            "In the {pic}, what shape is the {a}?",
        ),
        ("Which shape does the {a} have?", "In this {pic}, what shape is the {a}?", "Name the shape of the {a}."),
    ),
    "shape_of_one": Phrasings(
        (
            "What shape is this?",
            "What shape is it?",
            "What shape is in the {pic}?",
            "Which shape is this?",
            "What shape do you see?",
            "What shape is shown in this {pic}?",
        ),
        ("In this {pic}, what shape is it?", "Which shape do you see in the {pic}?"),
    ),
    "shape_of_colour": Phrasings(
        (
            "What {c} shape is there?",
            "Which shape is {c}?",
            "What shape is {c}?",
            "What is {c} in the {pic}?",
            "What shape is {c} in this {pic}?",
            "In the {pic}, what shape is {c}?",
        ),
        ("Which shape in the {pic} is {c}?",),
    ),
    "count_all": Phrasings(
        (
            "How many shapes are there?",
            "How many shapes are in the {pic}?",
            "How many shapes can you see?",
            "How many shapes do you see?",
            "What is the number of shapes in the {pic}?",
            "Count the shapes.",
            "Count the shapes in this {pic}.",
            "How many shapes are there in this {pic}?",
            "How many objects are there?",
            "How many objects are in the {pic}?",
            "Please tell me how many shapes there are.",
            "In the {pic}, how many shapes are there?",
        ),
        (
            "How many shapes does the {pic} have?",
            "In this {pic}, how many shapes are there?",
            "Tell me the number of shapes.",
        ),
    ),
    "count": Phrasings(
        (
            "How many {s} are there?",
            "How many {s} are in the {pic}?",
            "How many {s} can you see?",
            "How many {s} do you see?",
            "What is the number of {s} in the {pic}?",
            "Count the {s}.",
            "Count the {s} in this {pic}.",
            "How many {s} are there in this {pic}?",
            "Please tell me how many {s} there are.",
            "In the {pic}, how many {s} are there?",
        ),
        ("How many {s} does the {pic} have?", "In this {pic}, how many {s} are there?", "Tell me the number of {s}."),
    ),
    "count_adjective": Phrasings(
        (
            "How many shapes are {c}?",
            "How many of the shapes are {c}?",
            "How many shapes in the {pic} are {c}?",
            "How many {c} ones are there?",
            "In the {pic}, how many shapes are {c}?",
        ),
        ("How many of the shapes in the {pic} are {c}?",),
    ),
    "relation": Phrasings(
        (
            "What is {where} the {a}?",
            "What shape is {where} the {a}?",
            "Which shape is {where} the {a}?",
            "What do you see {where} the {a}?",
            "What can you see {where} the {a}?",
            "What is there {where} the {a}?",
            "Tell me what is {where} the {a}.",
            "What is {where} the {a} in the {pic}?",
            "{Where} the {a}, what is there?",
            "In the {pic}, what is {where} the {a}?",
        ),
        ("In this {pic}, what is {where} the {a}?", "Which shape do you see {where} the {a}?"),
    ),
    "presence": Phrasings(
        (
            "Is there {an}?",
            "Is there {an} in the {pic}?",
            "Is there {an} in this {pic}?",
            "Can you see {an}?",
            "Do you see {an}?",
            "Do you see {an} in the {pic}?",
            "Does the {pic} have {an}?",
            "Please tell me, is there {an}?",
            "In the {pic}, is there {an}?",
        ),
        ("In this {pic}, is there {an}?", "Can you see {an} in this {pic}?", "Tell me, do you see {an}?"),
    ),
    "presence_any": Phrasings(
        (
            "Are there any {s}?",
            "Are there any {s} in the {pic}?",
            "Can you see any {s}?",
            "Do you see any {s} in this {pic}?",
            "In the {pic}, are there any {s}?",
        ),
        ("In this {pic}, are there any {s}?",),
    ),
    "check_colour": Phrasings(
        (
            "Is the {a} {c}?",
            "Is the {a} in the {pic} {c}?",
            "Is the {colour} of the {a} {c}?",
            "Is it true that the {a} is {c}?",
            "In the {pic}, is the {a} {c}?",
            "Please tell me, is the {a} {c}?",
        ),
        ("In this {pic}, is the {a} {c}?", "Is it true that in the {pic} the {a} is {c}?"),
    ),
    "check_shape": Phrasings(
        (
            "Is the {a} a {k}?",
            "Is the {a} in the {pic} a {k}?",
            "Is the shape of the {a} a {k}?",
            "Is it true that the {a} is a {k}?",
            "In the {pic}, is the {a} a {k}?",
            "Please tell me, is the {a} a {k}?",
        ),
        ("In this {pic}, is the {a} a {k}?", "Is it true that in the {pic} the {a} is a {k}?"),
    ),
    "describe": Phrasings(
        (
            "Describe the {pic}.",
            "Describe this {pic}.",
            "What is in the {pic}?",
            "What is in this {pic}?",
            "What do you see?",
            "What can you see in this {pic}?",
            "What does the {pic} show?",
            "Please describe what you see.",
            "What is shown in this {pic}?",
            "What shapes are there?",
            "Which shapes are in the {pic}?",
            "Tell me what is in the {pic}.",
            "Name the shapes in this {pic}.",
            "In the {pic}, what do you see?",
            "Describe the {pic} in detail.",
            "Describe what you see.",
            "What do you see in this {pic}?",
        ),
        ("Please describe this {pic}.", "What do you see in the {pic}?", "Tell me what you see in this {pic}."),
    ),
}

WHERE: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}


def phrase(kind: str, held_out: bool, rng: np.random.Generator, **slots: str) -> str:
    """One phrasing of this kind with its slots filled."""
    choices = PHRASINGS[kind].held_out if held_out else PHRASINGS[kind].train
    text = choices[int(rng.integers(len(choices)))]
    picture = PICTURE_WORDS[int(rng.integers(len(PICTURE_WORDS)))]
    if "where" in slots:
        slots["Where"] = slots["where"].capitalize()
    return text.format(pic=picture, colour=("colour", "color")[int(rng.integers(2))], **slots)


def casual(text: str, rng: np.random.Generator) -> str:
    """Now and then, the question as people type it: without its final mark, in small letters, or contracted."""
    if rng.random() < 0.06:
        text = text.replace("What is", "What's").replace("what is", "what's")
    if rng.random() < 0.06:
        text = text.rstrip("?.")
    if rng.random() < 0.06:
        text = text.lower()
    return text
