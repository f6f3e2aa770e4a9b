"""`llava-serve batch`: a file of questions in, a file of answers out."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError
from llava_serve.ray_application import application_package

if TYPE_CHECKING:
    from llava_serve.batch.job import BatchJob
    from llava_serve.batch.plan import Plan

_EXAMPLE = """
example:
  llava-serve batch questions.csv answers.jsonl --temperature 0

questions.csv has the columns id, image and question. JSONL has the same fields, an object a line; OpenAI batch files
are read, too. The same command goes on where a run was stopped. The exit status is 0 if every row has its answer,
1 if some have an error instead, 2 for a usage error, and 130 after Ctrl-C.
"""


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of questions",
        description="Answer the questions of a file, each about its own pictures, and write a JSON object a line.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, metavar="IN", help="questions: *.csv, *.tsv, or JSONL")
    parser.add_argument("output", type=Path, metavar="OUT", help="file for the answers, in JSONL")
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--address", metavar="HOST:PORT", help="run on this Ray cluster, by Ray Data, instead of in this process"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="models on the cluster; by default one for each GPU that is free"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Checks the files and the model, and answers."""
    from llava_serve.batch.job import BatchJob
    from llava_serve.batch.plan import Plan

    flags.sampling(options)
    if options.workers is not None and (options.address is None or options.workers < 1):
        raise RequestError("--workers is 1 or more, and goes with --address.")
    command = None if options.address is None else _cluster_command(options.address)
    job = BatchJob(
        input=options.input,
        output=options.output,
        model=flags.model_options(options),
        sampling=flags.given(options, *flags.SAMPLING_FLAGS),
    )
    plan = Plan(job)
    print(_summary(plan), file=sys.stderr)
    if command is not None and plan.done < plan.total:
        plan.output.close()
        _run_on_cluster(command, job, options)
    from llava_serve.batch.run import run_here

    return run_here(plan)


def _summary(plan: Plan) -> str:
    parts = [f"{plan.job.input} has {plan.total:,} rows"]
    if plan.done:
        parts.append(f"{plan.done:,} of them have their answers in {plan.job.output}")
    if plan.changed:
        parts.append(f"{plan.changed:,} have changed since they were answered, and are asked again")
    return "; ".join(parts) + "."


def _cluster_command(address: str) -> list[str]:
    """What runs a job on a cluster.

    Raises:
        RequestError: an extra is not installed, or nothing listens there.
    """
    from llava_serve.cli.ports import check_reachable

    check_reachable(address)
    try:
        if not all(map(find_spec, ("pandas", "pyarrow"))):
            raise ImportError("Ray Data is not installed: pip install 'llava-serve[serve,data]', on the cluster too.")
        return [sys.executable, "-m", f"{application_package()}.tools.batch"]
    except ImportError as error:
        raise RequestError(str(error)) from None


def _run_on_cluster(command: list[str], job: BatchJob, options: argparse.Namespace) -> NoReturn:
    """Becomes the process that runs the job there, so that signals and the exit status are its own."""
    job = job.model_copy(update={"input": job.input.absolute(), "output": job.output.absolute()})
    command += [job.model_dump_json(), "--address", options.address]
    command += [] if options.workers is None else ["--workers", str(options.workers)]
    os.execv(sys.executable, command)
