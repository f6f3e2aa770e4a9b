"""What a card can do at all, and kernels by themselves: the parts `env`, `attention` and `kernels` of gpu_round."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import transformers

from llava_serve.engine.executor.kernels import twins
from llava_serve.engine.executor.kernels.selection import LayerShape, decode_kernel, layer_kernels, top_p_kernel
from llava_serve.engine.executor.kv_pool import KVPool, KVWrite
from llava_serve.engine.executor.varlen import _OPERATION, VarlenAttention, trial_error

HEADS = ((32, 32, "llama 7b"), (32, 8, "mistral 7b"), (56, 8, "yi 34b"))
CONTEXT, EXTENT, HEAD_DIM, LAYERS = 650, 672, 128, 8
"""Keys of a sequence, what they take of the cache, and layers: as many as do not fit the card's caches."""
PAGE = 16
"""Positions of a page. An extent is whole pages."""


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


def each_kernel(shape: LayerShape, vocabulary: int, count: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Each kernel with a token of each of `count` sequences: its time and its twin's, the largest difference between
    them, and the bytes that it moves in its time as a share of the bandwidth. Where it does not run, the twin alone."""
    chosen = layer_kernels(shape)
    kernels: dict[str, Callable[..., torch.Tensor] | None] = {
        "add_rmsnorm": chosen.add_rmsnorm,
        "rotate_and_write": chosen.rotate_and_write,
        "silu_mul": chosen.silu_mul,
        "decode_attention": decode_kernel(shape, PAGE, alibi=False),
        "sample_top_p": top_p_kernel(torch.float32, shape.device),
    }
    for name, (arguments, moved) in _work(shape, vocabulary, count).items():
        if shape.float8 and name not in ("rotate_and_write", "decode_attention"):  # the others are the same ones
            continue
        twin = getattr(twins, name)
        figures = {"kernel": name, "float8": shape.float8, "sequences": count}
        figures["twin_us"] = round(_call_us(twin, arguments, shape.device), 1)
        kernel = kernels[name]
        if kernel is not None and kernel is not twin:
            spent = _call_us(kernel, arguments, shape.device)
            found, expected = (_result(function, arguments) for function in (kernel, twin))
            figures |= {"us": round(spent, 1), "share": round(moved / (bandwidth * 1e6) / spent, 3)}
            figures["difference"] = float((found - expected).abs().max())
        yield figures


def _result(function: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> torch.Tensor:
    """Of copies of the arguments: some kernels write to them."""
    own = [part.clone() if isinstance(part, torch.Tensor) else part for part in arguments]
    return function(*own).double()


def _work(shape: LayerShape, vocabulary: int, count: int) -> dict[str, tuple[tuple[Any, ...], int]]:
    """The arguments of each kernel, and the bytes that it reads and writes."""
    device, dtype, kv_heads, head_dim = shape.device, shape.dtype, shape.kv_heads, shape.head_dim

    def random(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=kind)

    scales = torch.ones(1, 2, kv_heads, device=device) if shape.float8 else None
    pool = KVPool(1, kv_heads, count * EXTENT, head_dim, dtype, device, scales)
    slots = torch.arange(count * EXTENT, device=device)
    pool.write(0, [KVWrite(0, len(slots))], *(random(kv_heads, len(slots), head_dim) for _ in range(2)))
    layer = (*pool.layers[0], pool.scales[0])
    stored = pool.layers[0][0].dtype.itemsize
    qkv = random(count, (shape.heads + 2 * kv_heads) * head_dim)
    angles = [random(count, head_dim // 2).repeat(1, 2) for _ in range(2)]
    table = (slots[::PAGE] // PAGE).view(count, -1).int()
    used = torch.full((count,), CONTEXT, dtype=torch.int32, device=device)
    logits = random(count, vocabulary, kind=torch.float32)
    share = torch.full((count,), 0.9, device=device)
    noise = torch.rand(count, dtype=torch.float64, device=device)
    residual, gate_up = random(count, shape.hidden), random(count, 2 * shape.intermediate)
    query = random(count, shape.heads, head_dim)
    written = count * (shape.heads * dtype.itemsize + 2 * kv_heads * stored) * head_dim
    pages = (table, used, PAGE, None, None, None)
    return {
        "add_rmsnorm": ((random(count, shape.hidden), residual, random(shape.hidden), 1e-5), 4 * residual.nbytes),
        "rotate_and_write": ((qkv, *angles, slots[::EXTENT], *layer), qkv.nbytes + written),
        "silu_mul": ((gate_up,), gate_up.nbytes * 3 // 2),
        "decode_attention": ((query, *layer[:2], *pages, layer[2]), 2 * count * CONTEXT * kv_heads * head_dim * stored),
        "sample_top_p": ((logits, share, noise), logits.nbytes),
    }


def _call_us(function: Callable[..., object], arguments: tuple[Any, ...], device: torch.device) -> float:
    """Microseconds of a call. On CUDA of several in one graph, without the host."""
    if device.type != "cuda":
        return 1e3 * timed(lambda: function(*arguments), device.type, times=3)
    function(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            function(*arguments)
    return 1e3 * timed(graph.replay, device.type) / LAYERS
