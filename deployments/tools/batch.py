"""`llava-serve batch --address`: a batch job on a Ray cluster, by Ray Data over the library's own engine and files."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from llava_serve.batch.input_file import Item
from llava_serve.batch.job import BatchJob
from llava_serve.batch.plan import Plan
from llava_serve.batch.run import Answerer, Line, run_plan
from llava_serve.errors import LlavaServeError, RequestError

_QUESTIONS_PER_TASK = 256
"""Some times what an engine works on at once, since it runs empty at the end of each task."""


class AnswerQuestions:
    """A model on the cluster, as `map_batches` runs it."""

    def __init__(self, job: str, is_openai: bool) -> None:
        self._answerer = Answerer(BatchJob.model_validate_json(job), is_openai=is_openai)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Answers a task's questions. All at once: were they given one by one, those of a task that is done a second
        time, after a lost node, could not be told from those of the first."""
        items = (Item(**json.loads(item)) for item in batch["item"])
        return {"line": [json.dumps(line) for line in self._answerer.answer(items)]}


def main(argv: list[str] | None = None) -> int:
    """The exit status is that of `llava-serve batch`."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.batch", description=__doc__)
    parser.add_argument("job", type=BatchJob.model_validate_json, help="a BatchJob, as JSON")
    parser.add_argument("--address", required=True, help="of the cluster")
    parser.add_argument("--workers", type=int, help="models; by default one for each free GPU, or one")
    options = parser.parse_args(argv)
    try:
        plan = Plan(options.job)
        print(f"Joining the cluster at {options.address} ...", file=sys.stderr)
        _join(options.address)
        resources = free_resources(options.job.model.device, options.workers)
        return run_plan(plan, lambda items: _answers(plan, items, **resources))
    except LlavaServeError as error:
        print(f"llava-serve: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    except RayError as error:
        print(f"llava-serve: the cluster has failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


def free_resources(device: str, workers: int | None) -> dict[str, Any]:
    """How many models run on the cluster, and what each takes of what is free.

    Raises:
        RequestError: nothing is free.
    """
    free = ray.available_resources()
    gpus, cpus = int(free.get("GPU", 0)), free.get("CPU", 0.0)
    if device.startswith("cuda") and not gpus:
        raise RequestError("No GPU of the cluster is free.")
    on_gpu = gpus > 0 and device != "cpu"
    size = workers or (gpus if on_gpu else 1)
    if not cpus or (on_gpu and size > gpus):
        raise RequestError(f"The cluster has {cpus:g} CPUs and {gpus} GPUs free; {size} workers need more.")
    return {"size": size, "num_gpus": 1 if on_gpu else 0, "num_cpus": min(1.0, cpus / size)}


def _join(address: str) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(f"The cluster at {address} cannot be joined: {str(error).splitlines()[0]}") from None
    ray.data.DataContext.get_current().enable_progress_bars = False


def _answers(plan: Plan, items: Iterator[Item], *, size: int, num_gpus: int, num_cpus: float) -> Generator[Line]:
    """The answers, a task's at a time."""
    questions = [{"item": json.dumps(asdict(item))} for item in items]
    if not questions:
        return
    per_task = min(_QUESTIONS_PER_TASK, math.ceil(len(questions) / (2 * size)))
    answered = ray.data.from_items(questions, override_num_blocks=math.ceil(len(questions) / per_task)).map_batches(
        AnswerQuestions,
        batch_size=None,  # a block is a task
        compute=ray.data.ActorPoolStrategy(size=size),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        fn_constructor_args=(plan.job.model_dump_json(), plan.is_openai),
    )
    for answer in answered.iter_rows():
        position, failed, line = json.loads(answer["line"])
        yield position, failed, line


if __name__ == "__main__":
    sys.exit(main())
