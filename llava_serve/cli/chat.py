"""`llava-serve chat`: a conversation about pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

if TYPE_CHECKING:
    from llava_serve.llm import LLM
    from llava_serve.sampling_params import SamplingParams
    from llava_serve.types import Message


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "chat", help="chat about pictures", description="Chat about pictures. An empty line or Ctrl-D ends the chat."
    )
    flags.add_image_flags(parser)
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads questions from standard input until it ends."""
    from llava_serve.types import ImagePart, Message, TextPart

    sampling = flags.sampling(options)
    images = [ImagePart(image) for image in flags.images(options)]
    llm = flags.load_llm(options)
    history: tuple[Message, ...] = ()
    for question in _questions():
        # The images belong to the first turn; the template repeats them with the history.
        parts = (*(images if not history else ()), TextPart(question))
        asked = (*history, Message("user", parts))
        try:
            answer = _answer(llm, asked, sampling)
        except RequestError as error:
            print(error, file=sys.stderr)
            continue
        history = (*asked, Message("assistant", (TextPart(answer),)))
    return 0


def _questions() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (adds line editing to `input`)
    try:
        while question := input("> ").strip():
            yield question
    except EOFError:
        print()


def _answer(llm: LLM, messages: tuple[Message, ...], sampling: SamplingParams) -> str:
    """Prints the answer as it is generated; Ctrl-C stops it, and the conversation goes on with the text so far."""
    texts: list[str] = []
    chunks = llm.stream(messages, sampling)
    with suppress(KeyboardInterrupt):
        for chunk in chunks:
            texts.append(chunk.text)
            print(chunk.text, end="", flush=True)
    print()
    return "".join(texts)
