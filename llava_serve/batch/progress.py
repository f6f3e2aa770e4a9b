"""How far a job is, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30


def progress_bar(total: int, done: int) -> tqdm[None]:
    """A bar with the rate, the time left and the number of errors.

    Args:
        total: rows of the job.
        done: those that were done earlier.
    """
    terminal = sys.stderr.isatty()
    has_size = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(
        total=total,
        initial=done,
        unit="row",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else _SECONDS_BETWEEN_LINES,
        maxinterval=float("inf"),
        miniters=1,
        ncols=None if has_size else 80,
        dynamic_ncols=has_size,
        bar_format=None if terminal else "{n_fmt} of {total_fmt} rows, {rate_fmt}, {remaining} left{postfix}",
    )


class _Lines:
    """A file that gets what tqdm draws over one line, as lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if shown := text.strip():
            self._file.write(shown + "\n")

    def flush(self) -> None:
        self._file.flush()
