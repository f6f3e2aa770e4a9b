"""`llava-serve ask`: one question, one answer, printed as it is generated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

if TYPE_CHECKING:
    from llava_serve.checkpoints import CheckpointSpec
    from llava_serve.results import GenerationResult


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "ask",
        help="answer one question",
        description="Answer one question about pictures.",
        **flags.examples(
            'llava-serve ask cat.jpg "What is this?"',
            "llava-serve ask --model /models/llava-v1.6-vicuna-7b --temperature 0 --image a.png --image b.png \\",
            '    "Compare <image-placeholder> with <image-placeholder>."',
        ),
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE ... QUESTION",
        help="pictures, as --image has them, and the question; <image-placeholder> marks where a picture goes",
    )
    parser.add_argument("--query", metavar="QUESTION", help="another way to give the question")
    flags.add_image_flags(parser)
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON when it is complete")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Loads the model and answers."""
    question = _take_words(options)
    sampling, images = flags.sampling(options), flags.images(options)
    llm = flags.load_llm(options)
    if options.json:
        print(_as_json(llm.spec, llm.generate(question, images, sampling)))
        return 0
    for chunk in llm.stream(question, images, sampling):
        print(chunk.text, end="", flush=True)
    print()
    return 0


def _take_words(options: argparse.Namespace) -> str:
    """The question; the words before it become pictures.

    Raises:
        RequestError: there is no question, or a word is not what its place says.
    """
    question: str
    *files, question = [*options.words, *([] if options.query is None else [options.query])] or [""]
    if not question.strip() or Path(question).is_file():
        raise RequestError("Give a question, as 'llava-serve ask FILE \"What is this?\"'.")
    for name in files:
        if name != "-" and ":" not in name and not Path(name).exists():
            raise RequestError(f"There is no picture {name!r}. A question of several words is put in quotes.")
    if files and (options.image or options.image_file):
        raise RequestError("Name all pictures before the question, or all with --image: their order matters.")
    options.image += files
    return question


def _as_json(spec: CheckpointSpec, result: GenerationResult) -> str:
    return json.dumps(
        {
            "model": spec.name,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "token_ids": result.token_ids,
            "prompt": result.prompt,
            "num_prompt_tokens": result.num_prompt_tokens,
            "template": f"{spec.conv_mode}: {spec.conv_reason}",
            "notes": [*spec.notes, *spec.remarks],
        },
        ensure_ascii=False,
    )
