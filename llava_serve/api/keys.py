"""The API keys that a server accepts. They are kept as SHA-256 digests, each with the name of its owner."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llava_serve.config import ApiOptions
from llava_serve.errors import RequestError

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "LLAVA_API_KEYS"
"""An environment variable with more keys, separated by commas or newlines."""

LOOK_INTERVAL_S = 1.0
"""The file of keys is looked at no more often."""
_TICK_S = 2.0
"""Steps of the time of a file, at most: of most file systems some milliseconds."""

_HASHED = "sha256:"
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)

Names = Mapping[bytes, str]
"""From a key's digest to its name."""


class ApiKeys:
    """The accepted keys, from all sources; those of the file are read again when it changes.

    Args:
        fixed: keys that never change.
        file: keys that do; None has none.
    """

    def __init__(self, fixed: Names, file: KeyFile | None = None) -> None:
        self._fixed = fixed
        self._file = file

    def name_of(self, key: bytes) -> str | None:
        """The name of a key's owner; None if the key is not accepted."""
        # A digest is looked up, so the time of a comparison tells nothing about a key.
        digest = hashlib.sha256(key).digest()
        found = self._fixed.get(digest)
        return self._file.names().get(digest) if found is None and self._file is not None else found


class KeyFile:
    """A file of keys. When a changed one cannot be used, the keys that were read last stay, and an error is logged.

    Args:
        path: may be a link that is replaced, as in a Kubernetes Secret.
        clock: seconds.

    Raises:
        RequestError: the file cannot be used.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._looked = clock()
        self._fault: str | None = None
        self._version, self._names = self._read()

    def names(self) -> Names:
        """The keys, as of the last second."""
        now = self._clock()
        if now - self._looked >= LOOK_INTERVAL_S:
            self._looked = now
            self._look()
        return self._names

    def _look(self) -> None:
        try:
            if self._version is not None and self._version_now() == self._version:
                return
            self._version, names = self._read()
        except RequestError as error:
            if error.message != self._fault:  # once, not once a second
                logger.error("%s The keys that were read last stay valid.", error)
            self._version, self._fault = None, error.message
        else:
            if self._fault or names != self._names:
                logger.info("The file of API keys has changed: %d keys.", len(names))
            self._names, self._fault = names, None

    def _read(self) -> tuple[object, Names]:
        """The version of what is read, and the keys."""
        version = self._version_now()  # first: what is written after it is read at the next look
        try:
            lines = self._path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):
            raise RequestError(f"The file of API keys {self._path} cannot be read.") from None
        return version, read_keys(lines, f"The file of API keys {self._path}")

    def _version_now(self) -> object:
        """None where the file is so new that a further change might leave its time as it is."""
        try:
            found = self._path.stat()
        except OSError:
            raise RequestError(f"The file of API keys {self._path} cannot be read.") from None
        age_s = time.time() - found.st_mtime
        return (found.st_ino, found.st_mtime_ns, found.st_size) if age_s > _TICK_S else None


def accepted_keys(options: ApiOptions, environment: Mapping[str, str] = os.environ) -> ApiKeys | None:
    """The keys of the options, of their file and of `LLAVA_API_KEYS`; None lets everyone in.

    Raises:
        RequestError: a source is named and cannot be used, or holds no key; it never lets everyone in. Or the options
            need keys, and there are none.
    """
    fixed: dict[bytes, str] = {}
    if options.api_keys:
        fixed |= read_keys(options.api_keys, "api.api_keys")
    if (text := environment.get(KEYS_VARIABLE)) is not None:
        fixed |= read_keys(re.split(r"[,\n]", text), KEYS_VARIABLE)
    file = KeyFile(Path(options.api_keys_file)) if options.api_keys_file is not None else None
    if fixed or file:
        return ApiKeys(fixed, file)
    for limit in ("max_in_flight_per_key", "requests_per_minute_per_key"):
        if getattr(options, limit) is not None:
            raise RequestError(f"api.{limit} needs API keys: set api.api_keys_file or {KEYS_VARIABLE}.")
    if options.cache_scope == "key":
        raise RequestError(f"api.cache_scope is key and needs API keys: set api.api_keys_file or {KEYS_VARIABLE}.")
    return None


def read_keys(lines: Iterable[str], source: str) -> dict[bytes, str]:
    """Reads keys: `KEY`, `name:KEY` or `name:sha256:HEX`. Blank lines, and those that begin with #, are left out.

    Args:
        lines: a key each.
        source: begins the sentence of an error.

    Raises:
        RequestError: a line is none of these forms, or there is no key. The sentence quotes no line.
    """
    names: dict[bytes, str] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            try:
                digest, name = _read_key(line)
            except ValueError:
                raise RequestError(f"{source}: key {number} is not KEY, name:KEY or name:sha256:HEX.") from None
            names[digest] = name
    if not names:
        raise RequestError(f"{source} holds no key; write one a line.")
    return names


def _read_key(line: str) -> tuple[bytes, str]:
    """The digest and the name. A key without a name is named by the beginning of its digest."""
    name, colon, key = line.partition(":")
    if not colon or line.startswith(_HASHED):
        name, key = "", line
    if not key or " " in key or not key.isprintable() or not (_NAME.fullmatch(name) or key == line):
        raise ValueError
    if key.startswith(_HASHED):
        digest = bytes.fromhex(key.removeprefix(_HASHED))
        if len(digest) != hashlib.sha256().digest_size:
            raise ValueError
    else:
        digest = hashlib.sha256(key.encode()).digest()
    return digest, name or f"key-{digest.hex()[:8]}"
