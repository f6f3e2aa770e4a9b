"""The command line. It imports quickly: the commands that need torch or the web server import them."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

import shtab

from llava_serve import __version__
from llava_serve.cli import ask, batch, bench, chat, eval, inspect, serve
from llava_serve.errors import CheckpointError, LlavaServeError, RequestError

USAGE_ERROR = 2
"""The exit status of a usage error, as argparse has it for a wrong flag."""


def command_parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    parser = _Parser(prog="llava-serve", description="Answer questions about pictures with LLaVA.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of llava-serve, torch and ray")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for a shell: bash, zsh or tcsh")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (ask, chat, batch, serve, inspect, bench, eval):
        command.add_to(commands)
    for each in commands.choices.values():
        each.set_defaults(parser=each)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 for a usage error, 1 for any other: both print one sentence on standard error.
    """
    options, unknown = command_parser().parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], re.findall(r"--?\w[\w-]*", options.parser.format_usage()), n=1)
        options.parser.error(f"{unknown[0]} is unknown" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except (RequestError, CheckpointError) as error:
        return _fail(str(error), USAGE_ERROR)
    except LlavaServeError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe; the interpreter would fail once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {error}", 1)
    return status


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one sentence, where argparse prints every flag before it."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        self.exit(USAGE_ERROR, f"{self.prog}: {message}{end} '{self.prog} --help' tells what there is.\n")


class _Version(argparse.Action):
    """Prints versions as installed: importing torch and ray would take seconds."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"llava-serve {__version__}")
        for name in ("torch", "ray"):
            try:
                print(name, metadata.version(name))
            except metadata.PackageNotFoundError:
                print(name, "is not installed")
        parser.exit()


def _fail(sentence: str, status: int) -> int:
    print(f"llava-serve: {sentence}", file=sys.stderr)
    return status
