"""One round on a GPU: decode steps against the bandwidth of the card, attention, sampling, pictures, and transformers.

    python -m benchmarks.gpu_round --bandwidth 3.0 env attention kernels decode float8 sampled vision
    python -m benchmarks.gpu_round --smoke            # tiny, on a CPU: shows that it runs

Weights are random and made on the device: no Ray, no network, no checkpoint. Each part prints one or more lines of
JSON, and adds them to `--output`. A part that fails prints its error as such a line, and the others go on; the exit
status is then 1.

`env`: the card, its bandwidth, products, and the parameters of torch's FlashAttention. `attention`: that kernel alone,
with ALiBi too. `kernels`: each of ours alone, against its twin, and the bytes that it moves in its time; with keys and
values in 8-bit floats, too. `decode`: steps of 1 to 128 sequences against the time in which weights and keys can be
read, the graph without the host, and steps that are not launched ahead. `float8`: the same with weights, keys and
values, and both in 8-bit floats. `sampled`: what kinds of sampling add. `vision`: the tower by tiles, first tokens,
bursts, and pictures that come while others decode, with the sizes of their pieces. `stream`: streams in one event loop.
`profile`: the kernels of a step by time. `transformers`: its own `generate` over the same sizes.

A bare machine needs: Python 3.11 or later with torch 2.11 or later for CUDA, transformers 5.17 or later, numpy, Pillow,
tokenizers, safetensors, accelerate, jinja2, psutil, tqdm, httpx2, llguidance and pydantic; this repository on
PYTHONPATH; no installation of the project. `--bandwidth` takes the TB/s that `env` reads. 7B in bfloat16 with 128
sequences takes about 70 GiB: fewer `--batches` fit smaller cards. Four runs of at most ten minutes each are enough:
`env attention kernels`, `decode sampled profile`, `float8`, `vision stream transformers`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, LlavaForConditionalGeneration

from benchmarks.gpu_decode import decode_figures
from benchmarks.gpu_kernels import decode_attention, each_kernel, environment, timed
from benchmarks.gpu_model import empty, fill, make_engine, on_device, quantize, random_llava, step_times, text_prompt
from benchmarks.make_checkpoint import SIZES, make_checkpoint
from benchmarks.options import make_parser, parse
from llava_serve import async_llm
from llava_serve.config import ImageOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.llama_decoder import layer_shape
from llava_serve.processor import Processor
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt

Figures = Iterator[dict[str, Any]]
ONCE = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)


def env(args: argparse.Namespace) -> Figures:
    yield environment(args.device, 256 if args.smoke else 8192)


def attention(args: argparse.Namespace) -> Figures:
    if args.device == "cpu":
        yield {"skipped": "the kernel is for CUDA"}
        return
    yield from decode_attention(args.batches, args.bandwidth)


def kernels(args: argparse.Namespace) -> Figures:
    language = random_llava(args.size, args.device).language_model
    config = language.config
    for float8 in (False, True):
        shape = layer_shape(language, config.num_key_value_heads, config.head_dim, float8=float8)
        for count in args.batches:
            yield from each_kernel(shape, config.vocab_size, count, args.bandwidth)


def decode(args: argparse.Namespace) -> Figures:
    model = random_llava(args.size, args.device)
    for count in args.batches:
        yield decode_figures(model, count, args)
        free(args)


def float8(args: argparse.Namespace) -> Figures:
    model = random_llava(args.size, args.device)
    few = sorted({args.batches[0], args.batches[len(args.batches) // 2], args.batches[-1]})
    for weights in ("plain", "fp8"):
        if weights == "fp8":
            quantize(model)
        for cache, count in itertools.product(("auto", "fp8"), few):
            figures = decode_figures(model, count, args, kv_cache_dtype=cache)
            yield {"weights": weights, "kv_cache_dtype": cache, **figures}
            free(args)


def sampled(args: argparse.Namespace) -> Figures:
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature": {"temperature": 1.0},
        "top_p": {"temperature": 1.0, "top_p": 0.9},
        "top_k": {"temperature": 1.0, "top_k": 40},
        "logprobs": {"logprobs": 5},
        "repetition": {"repetition_penalty": 1.1},
    }
    count = min(64, max(args.batches))
    engine = make_engine(random_llava(args.size, args.device), count)
    for kind, sampling in kinds.items():
        fill(engine, count, args.prompt, 200, **sampling)
        yield {"kind": kind, "sequences": count, "step_ms": round(median(step_times(engine, args.steps)), 3)}
        empty(engine, count)


def vision(args: argparse.Namespace) -> Figures:
    model = random_llava(args.size, args.device)
    for tiles in (1, 2) if args.smoke else (1, 2, 8, 16, 32):
        pixels = torch.randint(0, 255, (tiles, *model.spec.image.crop_size, 3), dtype=torch.uint8)
        spent = timed(lambda pixels=pixels: model.tower_features(pixels), args.device)  # type: ignore[misc]
        yield {"tiles": tiles, "tower_ms": round(spent, 2), "tiles_s": round(1e3 * tiles / spent)}
    processor, rng = Processor(model.spec, ImageOptions()), np.random.default_rng(0)

    def question(at: int) -> PreparedPrompt:
        pixels = rng.integers(0, 255, (336, 336, 3), dtype=np.uint8)
        return processor.prepare_query(f"Question {at}: what is this?", [Image.fromarray(pixels)])

    engine = make_engine(model, max(args.batches))
    first = [_answer(engine, [question(at)], f"alone {at}") for at in range(8)]
    yield {"alone_first_token_ms": round(1e3 * median(first[2:]), 2)}
    for count in (2,) if args.smoke else (8, 32):
        seconds = _answer(engine, [question(100 * count + at) for at in range(count)], f"burst {count}")
        yield {"burst": count, "images_s": round(count / seconds, 1)}
    for count in [each for each in (1, 8, 32) if each < max(args.batches)]:
        yield _late_pictures(engine, count, args, question)


def _answer(engine: Engine, prompts: list[PreparedPrompt], name: str) -> float:
    """Seconds until all prompts have their first token."""
    began = time.perf_counter()
    for at, prompt in enumerate(prompts):
        engine.add(engine.validator.accept(f"{name} {at}", prompt, ONCE))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def _late_pictures(
    engine: Engine, count: int, args: argparse.Namespace, question: Callable[[int], PreparedPrompt]
) -> dict[str, Any]:
    """Pictures that come while others decode: how long they wait, in which pieces they are computed."""
    fill(engine, count, args.prompt, 400)
    plain = step_times(engine, 12)
    waits, mixed, pieces = [], [], []
    for at in range(2 if args.smoke else 12):
        prompt, name = question(10_000 + 100 * count + at), f"late {count} {at}"
        began = time.perf_counter()
        engine.add(engine.validator.accept(name, prompt, ONCE))
        while engine.has(name):
            computed = engine.stats.computed_tokens
            mixed += step_times(engine, 1)
            pieces.append(engine.stats.computed_tokens - computed - count)
        waits.append(round(1e3 * (time.perf_counter() - began), 1))
    empty(engine, count)
    return {
        "decoding": count,
        "decode_ms": round(median(plain), 2),
        "mixed_step_ms": round(median(mixed), 2),
        "first_token_ms": waits,
        "pieces": pieces,
    }


def stream(args: argparse.Namespace) -> Figures:
    count, answer = min(64, max(args.batches)), 20 if args.smoke else 200
    model = random_llava(args.size, args.device)
    async_llm.build_engine = lambda *_: make_engine(model, count)  # type: ignore[attr-defined]
    served = async_llm.AsyncLLM()
    sampling = SamplingParams(temperature=0, max_new_tokens=answer, ignore_eos=True)

    async def one(at: int) -> int:
        return sum(
            [len(chunk.token_ids) async for chunk in served.generate_prepared(text_prompt(args.prompt, at), sampling)]
        )

    async def together() -> int:
        return sum(await asyncio.gather(*(one(at) for at in range(count))))

    for _ in range(2):
        began = time.perf_counter()
        tokens = asyncio.run(together())
        yield {"streams": count, "tokens_s": round(tokens / (time.perf_counter() - began))}
    served.close()


def profile(args: argparse.Namespace) -> Figures:
    from torch.profiler import ProfilerActivity, profile

    count = min(64, max(args.batches))
    engine = make_engine(random_llava(args.size, args.device), count)
    fill(engine, count, args.prompt, 200)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (args.device == "cuda")]) as profiled:
        step_times(engine, 3)
    key = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70), file=sys.stderr)
    began = time.process_time(), time.perf_counter()
    step_times(engine, args.steps)
    spent = time.process_time() - began[0], time.perf_counter() - began[1]
    yield {"processor_ms": round(1e3 * spent[0] / args.steps, 2), "wall_ms": round(1e3 * spent[1] / args.steps, 2)}


def transformers(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(SIZES[args.size], Path(folder), weights=False)
        config = AutoConfig.from_pretrained(folder)
    theirs = on_device(lambda: LlavaForConditionalGeneration(config), args.device).eval()
    for count in args.batches:
        few, many = (_generate_ms(theirs, count, tokens, args.device) for tokens in (8, 40))
        step = (many - few) / 32
        rest = round(few - 8 * step, 1)
        yield {"sequences": count, "step_ms": round(step, 2), "tokens_s": round(1e3 * count / step), "rest_ms": rest}


def _generate_ms(model: Any, count: int, tokens: int, device: str) -> float:
    """Of a batch of prompts with a picture each, with answers of so many tokens."""
    vision = model.config.vision_config
    features = (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(300, 30_000, (count, features + 44), device=device)
    ids[:, 4 : 4 + features] = model.config.image_token_id
    pixels = torch.randn(count, 3, vision.image_size, vision.image_size, device=device, dtype=torch.bfloat16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return timed(lambda: model.generate(**inputs, do_sample=False, **lengths), device, times=3)


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    each.__name__: each
    for each in (env, attention, kernels, decode, float8, sampled, vision, stream, profile, transformers)
}


def free(args: argparse.Namespace) -> None:
    """Gives back the memory of what is not used any more."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="llava-1.5-7b", choices=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--prompt", type=int, default=620, help="positions of a text prompt")
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of the roofline")
    parser.add_argument("--output", type=Path, help="a file to which the lines are added")
    args = parse(parser, device="cpu", size="tiny", batches=[1, 2], prompt=40, steps=4)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    failed = False
    for name in args.parts or PARTS:
        began = time.perf_counter()
        try:
            for figures in PARTS[name](args):
                tell(args, name, **figures)
        except Exception as error:  # a part that fails must not cost the round
            traceback.print_exc()
            tell(args, name, failed=repr(error)[:500])
            failed = True
        free(args)
        tell(args, name, seconds=round(time.perf_counter() - began, 1))
    return int(failed)


def tell(args: argparse.Namespace, part: str, **figures: Any) -> None:
    """Prints a line of JSON, and adds it to the output."""
    line = json.dumps({"part": part, **figures})
    print(line, flush=True)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
