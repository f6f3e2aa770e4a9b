"""Runs a job: asks what has no answer yet, and writes each answer as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

from llava_serve.batch.forms import prompt_of
from llava_serve.batch.input_file import Item
from llava_serve.batch.job import BatchJob
from llava_serve.batch.plan import Plan, form_of
from llava_serve.batch.progress import progress_bar
from llava_serve.config import ImageOptions

Line = tuple[int, bool, dict[str, Any]]
"""An answer: the position of its question, whether it is an error, and its line in the output."""


class Answerer:
    """Answers questions by an engine in this process. Images are decoded in other processes, ahead of it."""

    def __init__(self, job: BatchJob, *, is_openai: bool) -> None:
        from llava_serve.llm import LLM

        self._form = form_of(job, is_openai=is_openai)
        self._llm = LLM(job.model, image_options=ImageOptions(isolate=True))

    def answer(self, items: Iterable[Item]) -> Generator[Line]:
        """The answers of questions as they are finished. Questions are taken as the engine has room."""
        taken: dict[int, Item] = {}

        def prompts() -> Iterator[Any]:
            for number, item in enumerate(items):
                taken[number] = item
                yield prompt_of(self._form, item)

        with closing(self._llm.generate_iter(prompts())) as results:
            for number, result in results:
                item = taken.pop(number)
                yield item.position, isinstance(result, Exception), self._form.line(item, result)


def run_here(plan: Plan) -> int:
    """Runs a job in this process. The exit status is that of `run_plan`."""
    if plan.done == plan.total:
        return run_plan(plan, _none)
    print(f"Loading {plan.job.model_name} ...", file=sys.stderr)
    return run_plan(plan, Answerer(plan.job, is_openai=plan.is_openai).answer)


def run_plan(plan: Plan, answer: Callable[[Iterator[Item]], Generator[Line]]) -> int:
    """Writes the answers to what is left of a job, and puts them in the order of the input.

    Returns:
        The exit status: 0, 1 if a row of the job has an error, 130 after Ctrl-C.
    """
    output, errors = plan.job.output, 0
    try:
        with progress_bar(plan.total, plan.done) as bar, closing(answer(plan.items())) as lines:
            for position, failed, line in lines:
                plan.output.append(position, line)
                errors += failed
                if failed:
                    bar.set_postfix_str(_errors(errors), refresh=False)
                bar.update()
        plan.output.sort()
    except KeyboardInterrupt:
        print(
            f"Stopped: {output} has {plan.num_written:,} of {plan.total:,} rows. The same command goes on there.",
            file=sys.stderr,
        )
        return 130
    finally:
        plan.output.close()
    print(f"{output} has {plan.total:,} rows{', ' + _errors(errors) if errors else ''}.", file=sys.stderr)
    return 1 if errors else 0


def _none(items: Iterator[Item]) -> Generator[Line]:
    yield from ()


def _errors(count: int) -> str:
    return "1 error" if count == 1 else f"{count:,} errors"
