"""Notes on how a request was taken, for the header `x-llava-serve-notes`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

HEADER = "x-llava-serve-notes"
_MAX_HEADER = 1000
_MAX_LOGGED = 100
"""Names that are logged by one app: clients choose them."""

_logger = logging.getLogger(__name__)


class IgnoredFields:
    """Notes on the fields of requests that are ignored. Logs each name once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def notes(self, names: Sequence[str]) -> list[str]:
        """A note for each of these fields of a request."""
        for name in names:
            if name not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(name)
                _logger.warning("Requests have the field %a, which is not supported and ignored.", name)
        return [f"{name}: ignored" for name in names]


def header_value(notes: Sequence[str]) -> str:
    """The notes in printable ASCII, cut to a length that servers and proxies take."""
    text = "; ".join(notes).encode("ascii", "backslashreplace").decode()
    return "".join(each if each.isprintable() else "?" for each in text)[:_MAX_HEADER]
