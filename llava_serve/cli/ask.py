"""`llava-serve ask`: one question, one answer, printed as it is generated."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

if TYPE_CHECKING:
    from llava_serve.checkpoints import CheckpointSpec
    from llava_serve.results import GenerationResult


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser("ask", help="answer one question", description="Answer one question about pictures.")
    parser.add_argument("question", nargs="?", help="the question; <image-placeholder> marks where a picture goes")
    parser.add_argument("--query", help="another way to give the question")
    flags.add_image_flags(parser)
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON when it is complete")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Loads the model and answers."""
    if (options.question is None) == (options.query is None):
        raise RequestError("Give one question, as 'llava-serve ask --image FILE \"What is this?\"'.")
    question = options.question if options.query is None else options.query
    sampling, images = flags.sampling(options), flags.images(options)
    llm = flags.load_llm(options)
    if options.json:
        print(_as_json(llm.spec, llm.generate(question, images, sampling)))
        return 0
    for chunk in llm.stream(question, images, sampling):
        print(chunk.text, end="", flush=True)
    print()
    return 0


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
