"""Questions about a scene, each with the one answer that counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.cache import Facts
from training.palette import COLOURS, KINDS, PLURALS
from training.phrases import SHORT, WHERE, casual, phrase
from training.relations import DIRECTIONS, Direction
from training.view import View

Rng = np.random.Generator
_NUMBERS = ("no", "one", "two", "three", "four", "five")

# Kinds of question and how often training asks them. Looking up by kind and relations need more practice than the rest.
WEIGHTS: dict[str, float] = {
    "colour": 1.0,
    "shape": 0.9,
    "count_all": 0.3,
    "count_colour": 0.9,
    "count_kind": 1.2,
    "left_right": 3.0,
    "above_below": 3.6,
    "presence": 1.2,
    "check": 1.0,
    "describe": 1.4,
    "absent": 1.2,
}


@dataclass(frozen=True)
class Question:
    """A question, its canonical answer, and its kind (a key of `WEIGHTS`).

    `about` says which shapes one has to look at: all at once, or for a description one after the other.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A question before its final form: both answers, the short one being empty where a short answer makes no sense."""

    text: str
    sentence: str
    short: str
    about: tuple[int, ...] = ()


def ask(
    facts: Facts, index: int, kind: str, rng: Rng, *, held_out_names: bool = False, held_out_phrases: bool = False
) -> Question | None:
    """One question of this kind about scene `index` of a batch, or None if the scene has no clear answer to one."""
    view = View(facts[np.array([index])], held_out_names)
    asked = _KINDS[kind](view, held_out_phrases, rng)
    if asked is None:
        return None
    short = bool(asked.short) and rng.random() < 0.3
    text = asked.text if held_out_phrases else casual(asked.text, rng)
    if short:
        return Question(kind, text + SHORT, asked.short, asked.about)
    return Question(kind, text, asked.sentence, asked.about)


def several(facts: Facts, index: int, count: int, rng: Rng) -> list[Question]:
    """Training's questions about one scene, of mixed kinds."""
    kinds = list(WEIGHTS)
    weights = np.array(list(WEIGHTS.values()))
    found: list[Question] = []
    while len(found) < count:
        for k in rng.choice(len(kinds), size=count, p=weights / weights.sum()):
            question = ask(facts, index, kinds[k], rng)
            if question is not None and len(found) < count:
                found.append(question)
    return found


def article(name: str) -> str:
    """The name with a or an before it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _pick(rng: Rng, values: list[str]) -> str:
    return values[int(rng.integers(len(values)))]


def _not_there(name: str, text: str) -> _Asked:
    return _Asked(text, f"There is no {name} in the picture.", f"There is no {name}")


def _colour(view: View, held: bool, rng: Rng) -> _Asked | None:
    single = [i for i, k in enumerate(view.kinds) if view.kinds.count(k) == 1]
    if not single:
        return None
    i = single[int(rng.integers(len(single)))]
    colour, kind = view.names[i]
    if len(view.names) == 1 and rng.random() < 0.3:
        kind = _pick(rng, ["shape", "shape", "object"])
    return _Asked(phrase("colour", held, rng, a=kind), f"The {kind} is {colour}.", colour.capitalize(), (i,))


def _shape(view: View, held: bool, rng: Rng) -> _Asked | None:
    single = [i for i, c in enumerate(view.colours) if view.colours.count(c) == 1]
    if not single:
        return None
    i = single[int(rng.integers(len(single)))]
    colour, kind = view.names[i]
    if len(view.names) == 1 and rng.random() < 0.3:
        text = phrase("shape_of_one", held, rng)
        return _Asked(text, f"The shape is {article(kind)}.", kind.capitalize(), (i,))
    if rng.random() < 0.25:
        text = phrase("shape_of_colour", held, rng, c=colour)
    else:
        text = phrase("shape", held, rng, a=f"{colour} {_pick(rng, ['one', 'shape', 'object'])}")
    return _Asked(text, f"The {colour} shape is {article(kind)}.", kind.capitalize(), (i,))


def _number(n: int, singular: str, plural: str, text: str, about: tuple[int, ...] = ()) -> _Asked:
    verb = "is one" if n == 1 else f"are {_NUMBERS[n]}"
    return _Asked(text, f"There {verb} {singular if n == 1 else plural} in the picture.", str(n), about)


def _count_all(view: View, held: bool, rng: Rng) -> _Asked:
    return _number(len(view.names), "shape", "shapes", phrase("count_all", held, rng))


def _count_colour(view: View, held: bool, rng: Rng) -> _Asked:
    colour = _pick(rng, view.colours if rng.random() < 0.75 else list(COLOURS))
    if rng.random() < 0.3:
        text = phrase("count_adjective", held, rng, c=colour)
    else:
        text = phrase("count", held, rng, s=f"{colour} {_pick(rng, ['shapes', 'shapes', 'objects'])}")
    about = _where(view.colours, colour)
    return _number(len(about), f"{colour} shape", f"{colour} shapes", text, about)


def _count_kind(view: View, held: bool, rng: Rng) -> _Asked:
    kind = _pick(rng, view.kinds if rng.random() < 0.8 else list(KINDS))
    plural = PLURALS[KINDS.index(kind)]
    about = _where(view.kinds, kind)
    return _number(len(about), kind, plural, phrase("count", held, rng, s=plural), about)


def _where(values: list[str], value: str) -> tuple[int, ...]:
    return tuple(i for i, v in enumerate(values) if v == value)


def _relation(directions: tuple[Direction, ...]) -> Callable[[View, bool, Rng], _Asked | None]:
    def asked(view: View, held: bool, rng: Rng) -> _Asked | None:
        direction = directions[int(rng.integers(len(directions)))]
        counts, only = view.neighbours(direction)
        # "Nothing" is the answer about one shape of every scene, so it is asked for less often than it could be.
        nothing = rng.random() < 0.2
        anchors = [i for i in range(len(only)) if view.handles(i) and (counts[i] == 0 if nothing else only[i] >= 0)]
        if not anchors:
            return None
        i = anchors[int(rng.integers(len(anchors)))]
        name, where = _pick(rng, view.handles(i)), WHERE[direction]
        text = phrase("relation", held, rng, a=name, where=_pick(rng, list(where)))
        if nothing:
            return _Asked(text, f"There is nothing {where[0]} the {name}.", "Nothing", (i,))
        other = " ".join(view.names[only[i]])
        return _Asked(text, f"There is {article(other)} {where[0]} the {name}.", other.capitalize(), (i,))

    return asked


def _absent_name(view: View, rng: Rng) -> str:
    """A kind, a colour's shape or a combination that is not there; half of the combinations are nearly there."""
    form = rng.random()
    if form < 0.35:
        return _pick(rng, [k for k in KINDS if k not in view.kinds] or [""])
    if form < 0.55:
        return _pick(rng, [f"{c} shape" for c in COLOURS if c not in view.colours])
    missing = [(c, k) for c, k in view.sayable if (c, k) not in view.names]
    near = [(c, k) for c, k in missing if c in view.colours or k in view.kinds]
    return _pick(rng, [f"{c} {k}" for c, k in (near if rng.random() < 0.7 and near else missing)])


def _is_there(name: str, held: bool, rng: Rng) -> str:
    if rng.random() < 0.2:
        plural = f"{name}es" if name.endswith("cross") else f"{name}s"
        return phrase("presence_any", held, rng, s=plural)
    return phrase("presence", held, rng, an=article(name))


def _presence(view: View, held: bool, rng: Rng) -> _Asked | None:
    if rng.random() < 0.5:
        colour, kind = view.names[int(rng.integers(len(view.names)))]
        name = _pick(rng, [kind, f"{colour} shape", f"{colour} {kind}", f"{colour} {kind}"])
        named = [f"{c} {k} {c} shape" for c, k in view.names]
        about = tuple(i for i, names in enumerate(named) if name in names)
        return _Asked(_is_there(name, held, rng), f"Yes, there is {article(name)} in the picture.", "Yes", about)
    name = _absent_name(view, rng)
    if not name:
        return None
    return _Asked(_is_there(name, held, rng), f"No, there is no {name} in the picture.", "No")


def _check(view: View, held: bool, rng: Rng) -> _Asked | None:
    i = int(rng.integers(len(view.names)))
    colour, kind = view.names[i]
    if rng.random() < 0.5 and view.kinds.count(kind) == 1:
        said = (
            colour
            if rng.random() < 0.5
            else _pick(rng, [c for c in COLOURS if c != colour and (c, kind) in view.sayable])
        )
        text = phrase("check_colour", held, rng, a=kind, c=said)
        return _Asked(text, f"{_yes(said == colour)}, the {kind} is {colour}.", _yes(said == colour), (i,))
    if view.colours.count(colour) == 1:
        said = (
            kind if rng.random() < 0.5 else _pick(rng, [k for k in KINDS if k != kind and (colour, k) in view.sayable])
        )
        text = phrase("check_shape", held, rng, a=f"{colour} {_pick(rng, ['one', 'shape'])}", k=said)
        return _Asked(text, f"{_yes(said == kind)}, the {colour} shape is {article(kind)}.", _yes(said == kind), (i,))
    return None


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def _describe(view: View, held: bool, rng: Rng) -> _Asked | None:
    order = view.order()
    if order is None:
        return None
    names = [article(" ".join(view.names[i])) for i in order]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return _Asked(phrase("describe", held, rng), f"There is {listed} in the picture.", "", tuple(order))


def _absent(view: View, held: bool, rng: Rng) -> _Asked | None:
    name = _absent_name(view, rng)
    if not name:
        return None
    form = rng.random()
    if name.endswith(" shape"):
        name = name.removesuffix(" shape")
        if form < 0.5:
            return _not_there(f"{name} shape", phrase("shape", held, rng, a=f"{name} {_pick(rng, ['one', 'shape'])}"))
        name = f"{name} shape"
    elif form < 0.5:
        return _not_there(name, phrase("colour", held, rng, a=name))
    direction = DIRECTIONS[int(rng.integers(4))]
    return _not_there(name, phrase("relation", held, rng, a=name, where=_pick(rng, list(WHERE[direction]))))


_KINDS: dict[str, Callable[[View, bool, Rng], _Asked | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count_all": _count_all,
    "count_colour": _count_colour,
    "count_kind": _count_kind,
    "left_right": _relation(("left", "right")),
    "above_below": _relation(("above", "below")),
    "presence": _presence,
    "check": _check,
    "describe": _describe,
    "absent": _absent,
}
