"""What the engine itself costs and holds, without HTTP.

    python -m benchmarks.engine_costs gaps /tmp/bench/60m-anyres
    python -m benchmarks.engine_costs bookkeeping /tmp/bench/60m
    python -m benchmarks.engine_costs memory /tmp/bench/60m
    python -m benchmarks.engine_costs steps /tmp/bench/60m

`gaps`: eight answers run; then a request with an image of five tiles arrives. The longest gap between tokens, also
over the median gap before. `bookkeeping`: the share of a step outside of the model runner and sampling, and that of the
check for NaN and infinity, at 16 to 256 sequences and for prompts of 1,900 positions. `memory`: resident memory over
5,000 requests. `steps`: a decode step of questions about one image, by torch's operations and in C++; in turns, so that
a slow minute affects both.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.make_checkpoint import given_or_tiny
from benchmarks.options import make_parser, parse
from llava_serve.config import EngineOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.sampling_step import PendingStep
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt

FULL = {"gaps": 5, "bookkeeping": (16, 64, 128, 256), "memory": 5000, "steps": (1, 8, 16, 32)}
"""Rounds, sequences at once, requests, questions at once."""
SMOKE = {"gaps": 1, "bookkeeping": (16,), "memory": 20, "steps": (1, 2)}


def text_prompt(rng: np.random.Generator, length: int) -> PreparedPrompt:
    """Random ids behind the special ones."""
    return PreparedPrompt(token_ids=rng.integers(300, 30_000, length).astype(np.int32))


def fill(engine: Engine, rng: np.random.Generator, count: int, answer: int, name: str) -> None:
    """Adds `count` requests and runs their prompts, so that all decode."""
    sampling = SamplingParams(temperature=0, max_new_tokens=answer, ignore_eos=True)
    for at in range(count):
        engine.add(engine.validator.accept(f"{name}{at}", text_prompt(rng, 40), sampling))
    while engine.stats.waiting or engine.stats.generated_tokens == 0:
        engine.step()
    for _ in range(5):
        engine.step()


def gaps(llm: LLM, rounds: int) -> dict[str, Any]:
    """Gaps between tokens of eight answers, before and during the prefill of a large image."""
    rng = np.random.default_rng(0)
    engine = llm.engine
    ratios: dict[str, list[float]] = {"wall": [], "processor": []}
    milliseconds: list[float] = []
    tokens = 0
    for round_ in range(rounds):
        fill(engine, rng, 8, 400, f"{round_}-")
        before = [_timed(engine) for _ in range(40)]
        pixels = rng.integers(0, 255, (672, 672, 3), dtype=np.uint8)
        prompt = llm.processor.prepare_query("What is this?", [Image.fromarray(pixels)])
        tokens = prompt.num_tokens
        sampling = SamplingParams(temperature=0, max_new_tokens=1)
        engine.add(engine.validator.accept(f"{round_}-image", prompt, sampling))
        during = []
        while engine.has(f"{round_}-image"):
            during.append(_timed(engine))
        for at, clock in enumerate(ratios):
            longest = max(step[at] for step in during)
            ratios[clock].append(round(longest / median(step[at] for step in before), 2))
        milliseconds.append(round(1000 * max(wall for wall, _ in during), 1))
        for at in range(8):
            engine.abort(f"{round_}-{at}")
    return {"prompt_tokens": tokens, "longest_gap_ms": milliseconds, "longest_gap_over_median": ratios}


def _timed(engine: Engine) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this thread for a step: with `--threads 1` other processes do not count."""
    wall, processor = time.perf_counter(), time.thread_time()
    engine.step()
    return time.perf_counter() - wall, time.thread_time() - processor


def bookkeeping(llm: LLM, sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """CPU time of a step; of its scheduling, bookkeeping and outputs; and of the check for NaN and infinity."""
    rng = np.random.default_rng(0)
    engine = llm.engine
    spent = {"run": 0.0, "sample": 0.0, "check": 0.0}

    def watch(name: str, function: Any) -> Any:
        def watched(*args: Any, **named: Any) -> Any:
            started = time.thread_time()
            result = function(*args, **named)
            spent[name] += time.thread_time() - started
            return result

        return watched

    engine._runner.run = watch("run", engine._runner.run)  # type: ignore[method-assign]
    engine._runner._check_finite = watch("check", engine._runner._check_finite)  # type: ignore[method-assign]
    PendingStep.__init__ = watch("sample", PendingStep.__init__)  # type: ignore[method-assign]
    PendingStep.read = watch("sample", PendingStep.read)  # type: ignore[method-assign]

    def measure(steps: int) -> dict[str, float]:
        spent.update(run=0.0, sample=0.0, check=0.0)
        started = time.thread_time()
        for _ in range(steps):
            engine.step()
        whole = time.thread_time() - started
        books = whole - spent["run"] - spent["sample"]
        return {
            "step_ms": round(1000 * whole / steps, 3),
            "sample_ms": round(1000 * spent["sample"] / steps, 3),
            "bookkeeping_ms": round(1000 * books / steps, 3),
            "share": round(books / whole, 4),
            "check_ms": round(1000 * spent["check"] / steps, 3),
            "check_share": round(spent["check"] / whole, 4),
        }

    report = {}
    for size in sizes:
        fill(engine, rng, size, 200, f"{size}-")
        report[f"{size} sequences"] = measure(96)  # each sequence fills six blocks
        for at in range(size):
            engine.abort(f"{size}-{at}")
    for at in range(10):
        prompt = text_prompt(rng, 1900)
        engine.add(engine.validator.accept(f"prompt {at}", prompt, SamplingParams(temperature=0, max_new_tokens=1)))
    report["prompts"] = measure(10)
    return report


def memory(llm: LLM, count: int) -> dict[str, Any]:
    """Resident memory in MB after each tenth of the requests, each with its own image and a short answer."""
    rng = np.random.default_rng(0)
    engine = llm.engine
    sampling = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
    base = llm.processor.prepare_query("What is this?", [Image.fromarray(np.zeros((64, 64, 3), np.uint8))])
    samples = []
    for at in range(count):
        tiles = tuple(rng.integers(0, 255, tile.shape, dtype=np.uint8) for tile in base.tiles)
        prompt = PreparedPrompt(base.token_ids, base.image_spans, tiles, base.image_sizes, (f"image {at}",))
        engine.add(engine.validator.accept(str(at), prompt, sampling))
        while engine.num_requests >= 16 or (at == count - 1 and engine.has_work):
            engine.step()
        if (at + 1) % (count // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append(round(pages * resource.getpagesize() / 2**20, 1))
    return {"requests": count, "resident_mb": samples}


def steps(plain: LLM, native: LLM, sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """Milliseconds of a decode step by what computes it."""
    modes = {"plain": plain, "native": native}
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    sampling = SamplingParams(temperature=0, max_new_tokens=500, ignore_eos=True)
    report = {}
    for size in sizes:
        for llm in modes.values():
            for at in range(size):
                prompt = llm.processor.prepare_query(f"Question {at}?", [Image.fromarray(pixels)])
                llm.engine.add(llm.engine.validator.accept(f"{size}-{at}", prompt, sampling))
            while llm.engine._scheduler.load.online_decoding < size:
                llm.engine.step()
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(10):
            for mode, llm in modes.items():
                llm.engine.step()
                times[mode] += [_timed(llm.engine)[0] for _ in range(6)]
        report[size] = {mode: round(1000 * median(each), 2) for mode, each in times.items()}
        for llm in modes.values():
            for at in range(size):
                llm.engine.abort(f"{size}-{at}")
    return report


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=FULL)
    parser.add_argument("model", nargs="?", help="a checkpoint; --smoke makes one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    args = parse(parser)
    with given_or_tiny(parser, args) as model:
        print(json.dumps(measure(model, args), indent=2))


def measure(model: str, args: argparse.Namespace) -> object:
    """The figures of `args.what`."""
    caches: dict[str, Any] = {"kv_cache_bytes": 1 << 29}
    if args.what == "memory":  # caches that are full after a tenth of the requests
        caches = {"kv_cache_bytes": 1 << 25, "feature_cache_bytes": 1 << 20}
    options = EngineOptions(max_num_seqs=256, num_threads=args.threads, **caches)
    plain = options.model_copy(update={"compile": False})
    llm = LLM(model, dtype=args.dtype, engine=plain if args.what == "steps" else options)
    size: Any = (SMOKE if args.smoke else FULL)[args.what]
    match args.what:
        case "gaps":
            return gaps(llm, size)
        case "bookkeeping":
            return bookkeeping(llm, size)
        case "memory":
            return memory(llm, size)
    return steps(llm, LLM(model, dtype=args.dtype, engine=options), size)


if __name__ == "__main__":
    main()
