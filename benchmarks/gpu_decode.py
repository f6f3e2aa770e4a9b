"""Decode steps against the time in which a card can read what they need: parts `decode` and `float8` of gpu_round."""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from benchmarks.gpu_kernels import timed
from benchmarks.gpu_model import fill, make_engine, step_times
from llava_serve.engine.engine import Engine
from llava_serve.model.llava import Llava


def decode_figures(model: Llava, count: int, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Of steps of `count` sequences; `options` are the engine's."""
    engine = make_engine(model, count, **options)
    seconds = fill(engine, count, args.prompt, 200)
    times = step_times(engine, args.steps)
    least = _bytes_read(engine) / (args.bandwidth * 1e9)
    engine._pipeline.ahead = False
    synchronous = step_times(engine, args.steps)
    return {
        "sequences": count,
        "step_ms": round(median(times), 3),
        "worst_ms": round(max(times), 3),
        "synchronous_ms": round(median(synchronous), 3),
        "graph_ms": _graph_ms(engine, count),
        "roofline_ms": round(least, 3),
        "share_of_roofline": round(least / median(times), 3),
        "tokens_s": round(1e3 * count / median(times)),
        "prefill_tokens_s": round(count * args.prompt / seconds),
        "positions": engine._kv.num_blocks * engine._kv.block_size,
    }


def _bytes_read(engine: Engine) -> int:
    """In a step: the weights without the table of embeddings, and the keys and values of what runs."""
    language = engine.model.language_model
    weights = sum(one.nbytes for one in language.parameters()) - language.get_input_embeddings().weight.nbytes
    memory = engine._runner._memory._memory
    positions = sum(len(group.sequences[0].token_ids) for group in engine._scheduler.running)
    return int(weights + positions * memory.nbytes // memory.shape[3])


def _graph_ms(engine: Engine, count: int) -> float | None:
    """Milliseconds of a greedy decode step's graph without the host; None where there is none."""
    graphs = engine._runner._graphs
    if graphs is None:
        return None
    size = min(each for each in graphs._buckets if each >= count)
    return round(timed(graphs._replays[size, graphs._kinds[0]], "cuda"), 3)
