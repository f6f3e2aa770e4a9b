"""What the drivers share: the server and the picture they ask about, and how they report. Standard library only."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL = os.environ["LLAVA_URL"] + "/v1"
MODEL = "builtin"
QUESTION = "What colour is the circle?"
ANSWER = "The circle is red."
PICTURE = "data:image/png;base64," + base64.b64encode(Path(os.environ["LLAVA_PICTURE"]).read_bytes()).decode()
PARTS = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": QUESTION}]
MESSAGES = [{"role": "user", "content": PARTS}]

_CHECKS: dict[str, Callable[[], Any]] = {}


def check(title: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Makes a function, or a coroutine function, one of the driver's checks; it raises if it does not hold."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        _CHECKS[title] = function
        return function

    return register


def same(got: object, wanted: object) -> None:
    """Raises unless they are equal."""
    if got != wanted:
        raise AssertionError(f"got {got!r} instead of {wanted!r}")


def main() -> None:
    """Runs each check and prints a line of JSON for it; the tracebacks go to the standard error."""
    for title, function in _CHECKS.items():
        problem = ""
        try:
            outcome = function()
            if inspect.isawaitable(outcome):
                asyncio.run(outcome)
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps({"check": title, "problem": problem}), flush=True)
    sys.stdout.flush()
