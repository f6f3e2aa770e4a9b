"""What a card can do at all, and its attention kernel by itself: the parts `env` and `attention` of gpu_round."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import transformers

from llava_serve.engine.executor.varlen import _OPERATION, VarlenAttention, trial_error

HEADS = ((32, 32, "llama 7b"), (32, 8, "mistral 7b"), (56, 8, "yi 34b"))
CONTEXT, EXTENT, HEAD_DIM, LAYERS = 650, 672, 128, 8
"""Keys of a sequence, what they take of the cache, and layers: as many as do not fit the card's caches."""


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str, times: int = 20) -> float:
    """Median milliseconds of a call, the device's work included."""
    taken = []
    for _ in range(times + 3):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - began))
    return median(taken[3:])


def environment(device: str, size: int) -> dict[str, Any]:
    """The machine, and its bandwidth and products at `size` bytes and elements along a side."""
    source, target = (torch.zeros(size * size * 32, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    card = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "card": card and card.name,
        "memory_gib": card and round(card.total_memory / 2**30, 1),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": importlib.util.find_spec("triton") is not None,
        "copy_tb_s": round(2 * len(source) / timed(lambda: target.copy_(source), device) / 1e9, 3),
        "read_tb_s": round(len(source) / timed(lambda: source.view(torch.int64).sum(), device) / 1e9, 3),
        "product_tflops": round(2 * size**3 / timed(lambda: left @ right, device) / 1e9, 3),
        "flash_schema": str(_OPERATION._schema),
    }


def decode_attention(batches: list[int], bandwidth: float) -> Iterator[dict[str, Any]]:
    """FlashAttention over extents, one token a sequence, against the time in which its keys and values can be read."""
    device = torch.device("cuda")
    for heads, kv_heads, name in HEADS:
        for alibi in (False, True):
            trial = (device, torch.bfloat16, kv_heads, HEAD_DIM, heads // kv_heads, None, [1, 1])
            yield {"heads": name, "alibi": alibi, "trial_error": round(trial_error(*trial, alibi=alibi), 5)}
        for count in batches:
            shape = (LAYERS, 2, kv_heads, count * EXTENT, HEAD_DIM)
            memory = torch.randn(shape, device=device, dtype=torch.bfloat16)
            query = torch.randn(1, heads, count, HEAD_DIM, device=device, dtype=torch.bfloat16)
            bases = [at * EXTENT for at in range(count)]
            extents = VarlenAttention.of([1] * count, bases, [CONTEXT] * count, device)

            def layers(each: VarlenAttention = extents, query: Any = query, memory: Any = memory) -> None:
                for keys, values in memory:
                    each.attend(query, keys, values, None, None)

            layers()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers()
            spent = timed(graph.replay, "cuda") / LAYERS
            least = 2 * count * CONTEXT * kv_heads * HEAD_DIM * 2 / (bandwidth * 1e9)
            yield {"heads": name, "sequences": count, "us": round(1e3 * spent, 1), "share": round(least / spent, 3)}
