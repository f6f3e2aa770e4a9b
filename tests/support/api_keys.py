"""API keys, and a clock for what depends on time."""

from __future__ import annotations

KEY = "sk-2b7e151628aed2a6"
OTHER = "sk-abf7158809cf4f3c"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
