"""The command line. Importing it is quick: torch and the web server are imported by the commands that need them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from llava_serve import __version__
from llava_serve.cli import ask, chat, inspect, serve
from llava_serve.errors import CheckpointError, LlavaServeError, RequestError

USAGE_ERROR = 2
"""The exit status that argparse has for a wrong flag, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 if the user can mend it, 1 otherwise: then one sentence stands on standard error.
    """
    parser = argparse.ArgumentParser(prog="llava-serve", description="LLaVA answers questions about pictures.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of llava-serve, torch and ray")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (ask, chat, serve, inspect):
        command.add_to(commands)
    options = parser.parse_args(argv)
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
        # Whoever read the answer has seen enough; the interpreter would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {error}", 1)
    return status


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
