"""Flags that several commands share, and their values in the library's form."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_serve.sampling_params import ORIGINAL_TEMPERATURE, SamplingParams, with_original_temperature

if TYPE_CHECKING:
    from llava_serve.config import ModelOptions
    from llava_serve.llm import LLM

Commands = Any
"""What `add_subparsers` returns; argparse has no public name for it."""

SAMPLING_FLAGS = ("temperature", "top_p", "num_beams", "max_new_tokens", "seed")
"""The options of `add_sampling_flags`."""

_DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model and its device. An absent flag is None, so that the library's default holds."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", "--model-path", help="builtin (the default), a folder, or a hub id in the local cache"
    )
    add_loading_flags(group)


def add_loading_flags(group: argparse._ActionsContainer) -> None:
    """Adds the flags of a model that is named already."""
    add_description_flags(group)
    bits = group.add_mutually_exclusive_group()
    bits.add_argument(
        "--load-8bit", dest="quantization", action="store_const", const="8bit", help="8-bit weights (bitsandbytes)"
    )
    bits.add_argument(
        "--load-4bit", dest="quantization", action="store_const", const="4bit", help="4-bit weights (bitsandbytes)"
    )
    group.add_argument("--device", type=_device, help="auto (the default), cpu, cuda, cuda:1")
    group.add_argument(
        "--dtype", choices=_DTYPES, help="auto (the default) is float32 on a CPU, else the checkpoint's own"
    )


def add_description_flags(group: argparse._ActionsContainer) -> None:
    """Adds the flags that override what a checkpoint's files say."""
    group.add_argument("--model-base", metavar="PATH", help="base of a LoRA or projector-only checkpoint")
    group.add_argument("--vision-tower", metavar="PATH", help="vision tower, instead of the checkpoint's own")
    group.add_argument(
        "--vision-tower-weights",
        choices=("checkpoint", "folder"),
        help="the tower's weights are those in the checkpoint, or in the tower's folder; as in training by default",
    )
    group.add_argument("--conv-mode", help="prompt template, instead of the detected one")
    group.add_argument(
        "--image-aspect", choices=("pad", "square"), help="pad images to a square, or crop them; as the checkpoint says"
    )


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the pictures."""
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture: file, URL, or - to read it; repeatable"
    )
    parser.add_argument("--image-file", metavar="FILES", help="several pictures, separated by --sep")
    parser.add_argument("--sep", type=_separator, default=",", help="separator in --image-file; a comma by default")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the sampling flags. The spellings with underscores are the original's."""
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--temperature", type=float, help=f"0 is greedy; {ORIGINAL_TEMPERATURE} by default, 0 with beams"
    )
    group.add_argument("--top-p", "--top_p", type=float, help="nucleus sampling: above 0 and at most 1, the default")
    group.add_argument("--num-beams", "--num_beams", type=int, help="beam search above 1 (the default), greedy")
    group.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=int, help="longest answer in tokens; 512 by default"
    )
    group.add_argument("--seed", type=int, help="makes sampling repeatable; another one each time by default")


def model_options(options: argparse.Namespace) -> ModelOptions:
    """The library's form of the model flags.

    Raises:
        CheckpointError: there is no such checkpoint. Checked here, before torch takes seconds to import.
    """
    from llava_serve.checkpoints import open_checkpoint
    from llava_serve.config import ModelOptions

    model = ModelOptions(**given(options, *ModelOptions.model_fields))
    open_checkpoint(model)
    return model


def load_llm(options: argparse.Namespace) -> LLM:
    """Loads the model that the flags name."""
    model = model_options(options)
    from llava_serve.llm import LLM

    return LLM(**model.model_dump())


def images(options: argparse.Namespace) -> list[bytes]:
    """The pictures, in the flags' order. Read and decode them before the model is loaded: a wrong one fails at once.

    Raises:
        InvalidImageError: one cannot be read, fetched or decoded.
    """
    return read_images(image_names(options))


def image_names(options: argparse.Namespace) -> list[str]:
    """Files and URLs of the pictures, in the flags' order."""
    more = options.image_file.split(options.sep) if options.image_file else []
    return [name.strip() for name in (*options.image, *more)]


def read_images(names: Sequence[str]) -> list[bytes]:
    """Pictures by file name or URL; `-` is standard input.

    Raises:
        InvalidImageError: one cannot be read, fetched or decoded; the message names it.
    """
    from llava_serve.config import ImageOptions
    from llava_serve.errors import InvalidImageError
    from llava_serve.images.decode import decode_image
    from llava_serve.images.fetch import read_local_source

    limits = ImageOptions()
    read = []
    for name in names:
        data = sys.stdin.buffer.read() if name == "-" else read_local_source(name, limits)
        try:
            decode_image(data, limits)
        except InvalidImageError as error:
            raise InvalidImageError(f"{name}: {error}") from None
        read.append(data)
    return read


def sampling(options: argparse.Namespace) -> SamplingParams:
    """The library's form of the sampling flags."""
    return SamplingParams(**with_original_temperature(given(options, *SAMPLING_FLAGS)))


def positive(text: str) -> int:
    """A number that is at least 1: the type of a flag."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _separator(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not auto, cpu, cuda or cuda:N")
    return name


def examples(*commands: str) -> dict[str, Any]:
    """The end of a command's help, for `add_parser`."""
    lines = "\n".join(f"  {command}" for command in commands)
    return {"epilog": f"examples:\n{lines}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The flags of these names that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
