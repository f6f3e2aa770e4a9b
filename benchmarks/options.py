"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(parser: argparse.ArgumentParser, **smoke: object) -> argparse.Namespace:
    """Reads the command line. With `--smoke` the values of `smoke` are the defaults; other flags still apply."""
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs; the figures mean nothing")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args()
