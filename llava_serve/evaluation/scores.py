"""What a scorer returns, and the table of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Table = dict[str, dict[str, float]]
"""A value by line and column."""


@dataclass(frozen=True)
class Scores:
    """The scores of an answer file.

    Attributes:
        table: shares in per cent; counts and MME's points as they are.
        unanswered: questions that are annotated and have no answer; they are in no score.
        note: how the figure that papers give is made.
    """

    table: Table
    unanswered: int
    note: str


def percent(values: Iterable[float]) -> float:
    """The mean of shares, in per cent; 0 of none."""
    listed = list(values)
    return 100 * sum(listed) / len(listed) if listed else 0.0


def grouped(values: Iterable[tuple[str, float]], overall: str = "all") -> Table:
    """Number and mean of shares by group, in the groups' order, and of all together."""
    groups: dict[str, list[float]] = {}
    everything: list[float] = []
    for name, value in values:
        groups.setdefault(name, []).append(value)
        everything.append(value)
    groups.pop("", None)
    lines = {**groups, overall: everything}
    return {name: {"questions": len(group), "accuracy": percent(group)} for name, group in lines.items()}


def as_text(scores: Scores) -> str:
    """The table, and what must be known to read it."""
    columns = list(dict.fromkeys(column for line in scores.table.values() for column in line))
    width = max(map(len, scores.table))
    lines = ["  ".join([" " * width, *(f"{column:>10}" for column in columns)])]
    for name, line in scores.table.items():
        cells = ("" if column not in line else _cell(line[column]) for column in columns)
        lines.append("  ".join([name.ljust(width), *(f"{cell:>10}" for cell in cells)]).rstrip())
    lines.append(scores.note)
    if scores.unanswered:
        lines.append(f"{scores.unanswered:,} annotated questions have no answer, and are left out.")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
