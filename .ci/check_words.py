"""Checks that names and messages use the field's own words. Run it from the repository's root.

It checks the names of Python files, the names that they define, their strings except docstrings, and the keys of
`serve_config.yaml`. Uses of a name are not checked, since a library may define it: an import, or a keyword in a call.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import yaml

CHECKED = ("llava_serve", "deployments", "tests", "benchmarks", "testbed", "examples")
LIBRARY = ("llava_serve", "deployments")

WORDS = {
    "house": "limiter, server",
    "guest": "client, request",
    "door": "endpoint, listener, ingress",
    "told": "reported",
    "tally": "usage",
    "alike": "shared prefix, cascade attention, similarity",
    "hole": "free block, gap",
    "ledger": "encoder cache",
    "pacer": "prefill budget",
    "sibling": "merged projections",
    "demand": "require, check",
    "floor": "layer",
    "leaving": "disconnect",
    "seat": "limit, capacity",
    "knock": "send a request",
    "mend": "fix, usage error",
}
"""A word, and what to say instead, in names and strings. Forms in -s and -ed are found, too."""

LIBRARY_WORDS = {
    "row": "sequence",
    "picture": "image",
    "before": "what it is: deadline, previous, start",
    "until": "deadline, end",
    "draw": "sample",
    "drawn": "sampled",
    "seen": "cached, found",
}
"""The same, only in the names of the library and the deployments."""

ALLOWED = {
    ("llava_serve/checkpoints/stored_tensor.py", "first_rows"): "rows of a matrix",
    ("llava_serve/images/pixels.py", "rows"): "rows of pixels",
    ("llava_serve/images/tiff.py", "row_bytes"): "row of pixels",
    ("llava_serve/images/tiff.py", "rows"): "rows of pixels",
    ("llava_serve/images/tiles.py", "rows"): "rows of a grid of tiles",
    ("tests/checkpoints/test_hub_cache.py", "siblings"): "a field of the hub's protocol",
}
"""Exceptions by file and text, with the reason."""


def main() -> int:
    """Prints one line per use of a word; the exit status is 1 if there is one."""
    found = [line for folder in CHECKED for path in sorted(Path(folder).rglob("*.py")) for line in in_python(path)]
    found += in_yaml(Path("serve_config.yaml"))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


def in_python(path: Path) -> Iterator[str]:
    """The uses in a Python file, its own name first."""
    tree = ast.parse(path.read_text("utf-8"))
    names = WORDS | LIBRARY_WORDS if path.parts[0] in LIBRARY else WORDS
    yield from uses(path, 1, path.stem, names)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from uses(path, node.lineno, node.value, WORDS)
        elif name := defined(node):
            yield from uses(path, node.lineno, name, names)  # type: ignore[attr-defined]  # every such node has a line


def defined(node: ast.AST) -> str | None:
    """The name that a node of a syntax tree defines, if it defines one."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return name
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return name
        case ast.alias(asname=name) | ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name):
            return name
    return None


def in_yaml(path: Path) -> Iterator[str]:
    """The uses in the keys of a YAML file."""
    tokens = list(yaml.scan(path.read_text("utf-8")))
    for token, scalar in pairwise(tokens):
        if isinstance(token, yaml.KeyToken) and isinstance(scalar, yaml.ScalarToken):
            yield from uses(path, scalar.start_mark.line + 1, scalar.value, WORDS)


def uses(path: Path, line: int, text: str, words: dict[str, str]) -> Iterator[str]:
    """The words in a name or a sentence, which is split at underscores, capitals and all that is no letter."""
    if (path.as_posix(), text) in ALLOWED:
        return
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text):
        lower = word.lower()
        for form in {lower, re.sub(r"(s|ed)$", "", lower)} & words.keys():
            yield f"{path}:{line}: {word} -> {words[form]}"


if __name__ == "__main__":
    sys.exit(main())
