"""Links of the documentation that lead out of `docs/`: GitHub follows them, the site shows the file's name."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]*)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each link to a file outside of `docs/` by its text and the file's name."""
    return _OUTSIDE.sub(_named, markdown)


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    return text if path in text or path == f"{text}.md" else f"{text} (`{path}`)"
