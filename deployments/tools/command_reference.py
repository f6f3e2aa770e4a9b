"""Writes the reference of all commands from the parser that reads them.

python -m deployments.tools.command_reference > docs/commands.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterator

from llava_serve.cli import command_parser

INTRODUCTION = """# Commands

<!-- Written by `python -m deployments.tools.command_reference > docs/commands.md`; a test compares. -->

`llava-serve COMMAND --help` prints the same. The exit status is 0; 2 for a usage error, which no second attempt
changes; 1 for any other; 130 after Ctrl-C. An error is one sentence on standard error.
`llava-serve --print-completion bash` prints a completion script; `zsh` and `tcsh` are known, too.
`llava-serve --version` prints the versions of llava-serve, torch and Ray.
"""

_EXAMPLES = re.compile(r"\A\s*examples?:\n|^  ", re.MULTILINE)
"""Of a command's help: the heading, and the indent of each line."""


def main() -> int:
    """Prints the page."""
    sys.stdout.write(page())
    return 0


def page() -> str:
    """The page, in Markdown. What several commands have stands once, at the end."""
    [choice] = [each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    commands: dict[str, argparse.ArgumentParser] = choice.choices
    of: dict[str, list[str]] = {}
    for name, parser in commands.items():
        for action in _arguments(parser):
            of.setdefault(_row(action), []).append(name)
    shared = {row: names for row, names in of.items() if len(names) > 1}
    sections = [line for name, parser in commands.items() for line in _section(name, parser, shared)]
    table = [f"{row} {', '.join(names)} |" for row, names in shared.items()]
    return "\n".join(
        [INTRODUCTION, *sections, "## Flags of several commands\n", "| flag | | of |\n|---|---|---|", *table, ""]
    )


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]


def _section(name: str, parser: argparse.ArgumentParser, shared: Collection[str]) -> Iterator[str]:
    about, _, details = (parser.description or "").partition("\n\n")
    yield f"## {name}\n\n{about}\n"
    if details:
        yield f"```text\n{details}\n```\n"
    yield f"```text\n{_EXAMPLES.sub('', parser.epilog or '').rstrip()}\n```\n"
    rows = [_row(action) for action in _arguments(parser)]
    if own := [row for row in rows if row not in shared]:
        yield "\n".join(["| argument | |\n|---|---|", *own, ""])
    if len(own) < len(rows):
        yield "And the [flags of several commands](#flags-of-several-commands) that name it.\n"


def _row(action: argparse.Action) -> str:
    meaning = (action.help or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| {_spelling(action)} | {meaning} |"


def _spelling(action: argparse.Action) -> str:
    """The flag in its spellings, with its value; of a positional argument its name."""
    value = " ".join(_values(action))
    if not action.option_strings:
        return f"`{value}`"
    *others, last = action.option_strings
    return ", ".join(f"`{each}`" for each in (*others, f"{last} {value}".strip()))


def _values(action: argparse.Action) -> Iterator[str]:
    if action.nargs == 0:
        return
    yield action.metavar if isinstance(action.metavar, str) else _choices(action) or action.dest.upper()
    if action.nargs == "+":
        yield "..."


def _choices(action: argparse.Action) -> str:
    return f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""


if __name__ == "__main__":
    raise SystemExit(main())
