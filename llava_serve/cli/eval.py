"""`llava-serve eval`: the original's evaluation of a model, or of answers that are there already."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

if TYPE_CHECKING:
    from llava_serve.evaluation.files import Answer, Question
    from llava_serve.llm import LLM

_TASKS = ("builtin", "exact", "gqa", "mme", "pope", "textvqa", "vqav2")

_EXAMPLE = """examples:
  llava-serve eval builtin
  llava-serve eval gqa /models/llava-v1.5-7b --questions llava_gqa_testdev_balanced.jsonl --images gqa/images \\
    --annotations testdev_balanced_questions.json --answers answers.jsonl
  llava-serve eval gqa --score answers.jsonl --annotations testdev_balanced_questions.json"""


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "eval",
        help="measure how right a model's answers are",
        description="Answer the original's question files by its protocol, and score the answers.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=_TASKS, metavar="TASK", help=", ".join(_TASKS))
    parser.add_argument("model", nargs="?", help="builtin (the default), a folder, or a hub id")
    files = parser.add_argument_group("files")
    files.add_argument("--questions", type=Path, metavar="FILE", help="lines of question_id, image and text")
    files.add_argument("--images", type=Path, metavar="DIR", help="the folder of the pictures; default: this one")
    files.add_argument("--annotations", type=Path, metavar="PATH", help="the right answers; without them, no scores")
    files.add_argument("--answers", type=Path, metavar="FILE", help="write the answers as the original does")
    files.add_argument("--resume", action="store_true", help="go on with the answers of an interrupted run")
    files.add_argument("--score", type=Path, metavar="FILE", help="score these answers, without a model")
    group = parser.add_argument_group("answers")
    group.add_argument("--suffix", choices=("short", "letter", "none"), default="short", help="default short")
    group.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy, as the original")
    group.add_argument("--num-beams", type=int, default=1, help="default 1")
    group.add_argument("--max-new-tokens", type=int, default=128, help="default 128, the original's for short answers")
    group.add_argument("--limit", type=flags.positive, metavar="N", help="only the first N questions")
    parser.add_argument("--json", action="store_true", help="print settings and scores as JSON")
    flags.add_loading_flags(parser.add_argument_group("model"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answers and scores."""
    if options.task != "builtin":
        return _evaluate(options)
    given = ("questions", "images", "annotations", "score")
    if names := [f"--{name}" for name in given if getattr(options, name) is not None]:
        raise RequestError(f"The task builtin has its own files and takes no {', '.join(names)}.")
    from llava_serve.evaluation.builtin_set import write_builtin_set

    with TemporaryDirectory() as folder:
        files = write_builtin_set(Path(folder) / "set")
        own = vars(options) | {"task": "exact", **vars(files)}
        return _evaluate(argparse.Namespace(**own))


def _evaluate(options: argparse.Namespace) -> int:
    """Checks all that is quick to check before the model is loaded."""
    from llava_serve.evaluation.files import read_answers, read_questions
    from llava_serve.evaluation.scores import as_text
    from llava_serve.evaluation.tasks import TASKS, read_annotations, score

    task = TASKS[options.task]
    if options.resume and options.answers is None:
        raise RequestError("--resume goes on with the answers in --answers FILE.")
    of_a_run = {"the model": "model", "--images": "images", "--answers": "answers", "--conv-mode": "conv_mode"}
    unused = [flag for flag, name in of_a_run.items() if getattr(options, name) is not None]
    if options.score is not None and unused:
        raise RequestError(f"--score takes answers that are there, and asks no model: leave out {', '.join(unused)}.")
    if options.score is None and options.questions is None:
        raise RequestError("Give --questions FILE to answer them, or --score FILE to score answers that are there.")
    if options.annotations is None and (options.score is not None or options.answers is None):
        raise RequestError("Give --annotations PATH with the right answers; without scores, --answers FILE to write.")
    if task.needs_questions and options.questions is None:
        raise RequestError(f"The annotations of {options.task} tell the categories with --questions FILE only.")
    questions = [] if options.questions is None else read_questions(options.questions)[: options.limit]
    annotations = options.annotations and read_annotations(task, options.annotations, questions)
    if options.score is not None:
        answers = read_answers(options.score)[: options.limit]
        settings = {"model": ", ".join(sorted({answer.model_id for answer in answers}))}
    else:
        answers, settings = _answer(options, questions, original=task.original)
    scores = None if annotations is None else score(task, annotations, answers)
    if options.json:
        print(json.dumps({"settings": settings, "scores": scores and asdict(scores)}, ensure_ascii=False))
        return 0
    for name, value in settings.items():
        print(f"{name:<15} {value}")
    if scores is not None:
        print(as_text(scores))
    return 0


def _answer(
    options: argparse.Namespace, questions: Sequence[Question], *, original: bool
) -> tuple[list[Answer], dict[str, Any]]:
    """The answers, and the settings that move their scores."""
    from llava_serve.evaluation.files import SUFFIXES, answers_so_far, write_answer
    from llava_serve.sampling_params import SamplingParams

    images, path, suffix = options.images or Path(), options.answers, SUFFIXES[options.suffix]
    missing = [each.image for each in questions if each.image is not None and not (images / each.image).is_file()]
    if missing:
        raise RequestError(f"{len(missing):,} pictures are not in {images}, the first is {missing[0]}.")
    if path is not None and path.exists() and not options.resume:
        raise RequestError(f"{path} is there already: choose another file, or go on with it by --resume.")
    if path is not None and not path.absolute().parent.is_dir():
        raise RequestError(f"{path} cannot be written: there is no such folder.")
    sampling = SamplingParams(
        temperature=options.temperature, num_beams=options.num_beams, max_new_tokens=options.max_new_tokens, seed=0
    )
    llm = flags.load_llm(options)
    from llava_serve.evaluation.protocol import answer_questions, template

    conv_mode = options.conv_mode or (template(llm.spec) if original else llm.spec.conv_mode)
    answers = answers_so_far(path, questions, suffix, llm.spec.name) if path is not None else []
    new = answer_questions(llm, questions[len(answers) :], images, sampling, suffix=suffix, conv_mode=conv_mode)
    with nullcontext() if path is None else path.open("a", encoding="utf-8") as file:
        for answer in _shown(new, len(questions) - len(answers)):
            answers.append(answer)
            if file is not None:
                write_answer(file, answer)
    return answers, _settings(options, llm, conv_mode)


def _settings(options: argparse.Namespace, llm: LLM, conv_mode: str) -> dict[str, Any]:
    from llava_serve.cli.inspect import as_lists, describe

    described = as_lists(describe(llm.spec))
    model = llm.engine.model
    dtype = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    return {
        "model": llm.spec.name,
        "template": conv_mode,
        **{name: described[name][0] for name in ("pictures", "transparency", "vision tower", "features")},
        "dtype": f"{dtype}, weights in {options.quantization}" if options.quantization else dtype,
        "temperature": options.temperature,
        "num_beams": options.num_beams,
        "max_new_tokens": options.max_new_tokens,
        "suffix": options.suffix,
    }


def _shown(answers: Iterable[Answer], count: int) -> Iterator[Answer]:
    """The same; on a terminal, a line on standard error tells how far it is."""
    start = time.monotonic()
    for number, answer in enumerate(answers, 1):
        yield answer
        if sys.stderr.isatty():
            rate = number / (time.monotonic() - start)
            left = f"{number:,} of {count:,} answered, {rate:.1f} a second, {(count - number) / rate:,.0f} s left"
            print(f"\r{left}\033[K", end="\n" if number == count else "", file=sys.stderr, flush=True)
