"""The keys that a server accepts."""

from __future__ import annotations

from pathlib import Path

from llava_serve.config import ApiOptions
from llava_serve.errors import RequestError


def accepted_keys(options: ApiOptions) -> tuple[str, ...]:
    """The keys of the options and of their file; empty lets everyone in.

    Raises:
        RequestError: the file cannot be read or holds no key. It never lets everyone in.
    """
    if options.api_keys_file is None:
        return options.api_keys
    path = Path(options.api_keys_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"The file of API keys {path} cannot be read.") from None
    keys = tuple(key for line in lines if (key := line.strip()))
    if not keys:
        raise RequestError(f"The file of API keys {path} holds no key; write one a line.")
    return options.api_keys + keys
