"""`llava-serve chat`: a conversation about pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

if TYPE_CHECKING:
    from llava_serve.llm import LLM
    from llava_serve.sampling_params import SamplingParams
    from llava_serve.types import Message

_COMMANDS = """/image FILE  adds a picture, or a URL, to the next question
/reset       begins anew, without pictures
/save FILE   writes the conversation as JSON, in OpenAI's form
/help        prints this
Ctrl-C stops an answer; an empty line or Ctrl-D ends the chat."""


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "chat",
        help="chat about pictures",
        description=f"Chat about pictures. In the chat:\n\n{_COMMANDS}",
        **flags.examples("llava-serve chat --model /models/llava-v1.5-7b --image cat.jpg"),
    )
    flags.add_image_flags(parser)
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads questions from standard input until it ends."""
    if "-" in options.image:
        raise RequestError("--image - goes with ask: chat reads questions from standard input.")
    sampling = flags.sampling(options)
    names = flags.image_names(options)
    images = flags.read_images(names)
    chat = _Chat(flags.load_llm(options), sampling)
    chat.add_images(names, images)
    for line in _lines():
        chat.read(line)
    return 0


def _lines() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (adds line editing to `input`)
    try:
        while line := input("> ").strip():
            yield line
    except EOFError:
        print()


class _Chat:
    """A conversation, and the pictures that belong to its next question.

    Attributes:
        history: what the model is asked.
        saved: the same in OpenAI's form, with the pictures' names.
    """

    def __init__(self, llm: LLM, sampling: SamplingParams) -> None:
        self._llm = llm
        self._sampling = sampling
        self._reset()

    def _reset(self) -> None:
        self.history: tuple[Message, ...] = ()
        self.saved: list[dict[str, Any]] = []
        self._images: list[tuple[str, bytes]] = []

    def add_images(self, names: list[str], images: list[bytes]) -> None:
        """Adds pictures to the next question."""
        self._images += zip(names, images, strict=True)

    def read(self, line: str) -> None:
        """Asks a question, or runs a command."""
        word, _, argument = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._ask(line)
            elif word == "/image" and argument:
                self.add_images([argument], flags.read_images([argument]))
            elif word == "/save" and argument:
                _save(Path(argument), self.saved)
            elif line == "/reset":
                self._reset()
            else:
                print(_COMMANDS)
        except RequestError as error:
            print(error, file=sys.stderr)

    def _ask(self, question: str) -> None:
        from llava_serve.types import ImagePart, Message, TextPart

        parts: list[ImagePart | TextPart] = [ImagePart(data) for _, data in self._images]
        parts.append(TextPart(question))
        asked = (*self.history, Message("user", tuple(parts)))
        answer = _answer(self._llm, asked, self._sampling)
        self.history = (*asked, Message("assistant", (TextPart(answer),)))
        images = [{"type": "image_url", "image_url": {"url": name}} for name, _ in self._images]
        content = [*images, {"type": "text", "text": question}]
        self.saved += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        self._images = []


def _save(path: Path, messages: list[dict[str, Any]]) -> None:
    try:
        path.write_text(json.dumps(messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}.") from None


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
