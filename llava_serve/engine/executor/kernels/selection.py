"""Which kernels run: those that agree with their twins in a trial at the start. On a CPU there is one.

A kernel that fails its trial is not used, and a warning says why.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch

from llava_serve.engine.executor.float8_cache import FLOAT8, LARGEST, bits, to_float8
from llava_serve.engine.executor.kernels import native_attention, native_build, native_prefill, twins

_logger = logging.getLogger(__name__)

Kernel = TypeVar("Kernel", bound=Callable[..., torch.Tensor])
DecodeKernel = Callable[..., torch.Tensor]
"""Decode attention over pages: see `twins.decode_attention`."""
Arguments = tuple[Any, ...]
"""Of a kernel, for a trial."""

_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, FLOAT8: 0.13}
"""Largest difference from the twin by precision, as a share of the largest number: two roundings in half precision, and
one in 8-bit floats."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of a decoder layer, and the precision and device of its weights. `float8`: the KV pool has 8-bit floats."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    float8: bool = False


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """What runs between the products of a layer: see `twins`."""

    add_rmsnorm: Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor, float], torch.Tensor]
    rotate_and_write: Callable[..., torch.Tensor]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, as Triton needs it: it launches kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def layer_kernels(shape: LayerShape) -> LayerKernels:
    """Each kernel of a layer, or its twin."""

    def kernel_or_twin(module: str, twin: Kernel, trials: Iterable[Arguments]) -> Kernel:
        return _selected(module, twin, trials, shape.dtype, shape.device) or twin

    rotary = rotary_trials(shape)
    if shape.float8:  # its scales are found without them
        rotary = itertools.chain(rotary_trials(dataclasses.replace(shape, float8=False)), rotary)
    return LayerKernels(
        kernel_or_twin("layers", twins.add_rmsnorm, norm_trials(shape)),
        kernel_or_twin("layers", twins.rotate_and_write, rotary),
        kernel_or_twin("layers", twins.silu_mul, silu_trials(shape)),
    )


@cache
def decode_kernel(shape: LayerShape, page_size: int, *, alibi: bool) -> DecodeKernel | None:
    """Decode attention over pages, where its kernel is to be used."""
    trials = decode_trials(shape, page_size, alibi=alibi)
    return _selected("decode_attention", twins.decode_attention, trials, shape.dtype, shape.device)


@cache
def native_decode_kernel(shape: LayerShape, page_size: int, *, alibi: bool) -> DecodeKernel | None:
    """Decode attention over pages on a CPU, where its kernel can be compiled and is right, and that of prompts."""
    if shape.dtype not in native_build.TYPES or not native_build.compiler():
        return None
    if native_prefill.supports(shape.head_dim):
        trials = prefill_trials(shape, alibi=alibi)
        if _tried(native_prefill, twins.prefill_attention, trials, shape.device) is None:
            return None
    return _tried(native_attention, twins.decode_attention, decode_trials(shape, page_size, alibi=alibi), shape.device)


@cache
def tower_kernel(shape: LayerShape) -> Callable[..., torch.Tensor] | None:
    """Attention of all tokens to all on a CPU, where its kernel can be compiled and is right."""
    return _tried(native_prefill, twins.prefill_attention, tower_trials(shape), shape.device)


@cache
def top_p_kernel(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """Top-p sampling of logits in this precision, where its kernel is to be used."""
    return _selected("top_p", twins.sample_top_p, top_p_trials(device), dtype, device)


def _selected(
    module: str, twin: Kernel, trials: Iterable[Arguments], dtype: torch.dtype, device: torch.device
) -> Kernel | None:
    """The kernel that has the twin's name, where it agrees with the twin; None elsewhere, on CUDA with a warning."""
    if device.type != "cuda":
        return None
    if dtype not in _TOLERANCES:
        _warn(twin, f"it has no {str(dtype).removeprefix('torch.')}")
        return None
    return _tried(f"{__package__}.{module}", twin, trials, device)


def _tried(module: str | ModuleType, twin: Kernel, trials: Iterable[Arguments], device: torch.device) -> Kernel | None:
    """The kernel that has the twin's name in a module, where it agrees with the twin."""
    try:
        found = importlib.import_module(module) if isinstance(module, str) else module
        kernel: Kernel = getattr(found, twin.__name__)
        with current_device(device):
            reason = disagreement(kernel, twin, trials)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # no Triton, no C compiler, or a GPU that Triton does not compile for
        reason = f"it does not run: {type(error).__name__} {next(iter(str(error).strip().splitlines()), '')}"
    if reason:
        _warn(twin, reason)
        return None
    return kernel


def _warn(twin: Callable[..., torch.Tensor], reason: str) -> None:
    _logger.warning("The kernel %s is not used, and steps are slower, since %s.", twin.__name__, reason)


def disagreement(kernel: Kernel, twin: Kernel, trials: Iterable[Arguments]) -> str:
    """How a kernel differs from its twin, in results or in what it writes to its arguments; empty if it does not."""
    for number, arguments in enumerate(trials, 1):
        results = []
        for function in (kernel, twin):
            own = [part.clone() if isinstance(part, torch.Tensor) else part for part in arguments]
            results.append([function(*own), *(part for part in own if isinstance(part, torch.Tensor))])
        if not all(map(_agree, *results)):
            return f"it gives wrong results here (trial {number})"
    return ""


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    largest = float(expected.double().nan_to_num().abs().max())
    tolerance = _TOLERANCES.get(expected.dtype, 0.0) * largest
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True)


class _Random:
    """Normal numbers in a layer's precision, on its device; the same ones each time."""

    def __init__(self, shape: LayerShape) -> None:
        self._options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        self._generator = torch.Generator(shape.device).manual_seed(0)

    def __call__(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, **self._options)


def _stored(shape: LayerShape, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and values [2, kv_heads, positions, head_dim] as they are stored, and their scales: powers of two."""
    if not shape.float8:
        return pool, None
    scales = torch.exp2(torch.arange(-2.0, 2 * shape.kv_heads - 2, device=shape.device) % 5).view(2, -1)
    halves = [bits(to_float8(half, scale)) for half, scale in zip(pool, scales, strict=True)]
    return torch.stack(halves).view(FLOAT8), scales


def norm_trials(shape: LayerShape) -> Iterator[Arguments]:
    """With and without something to add."""
    random = _Random(shape)
    for tokens in (1, 3):
        yield None, random(tokens, shape.hidden), random(shape.hidden), 1e-5
        yield random(tokens, shape.hidden), random(tokens, shape.hidden), random(shape.hidden), 1e-6


def rotary_trials(shape: LayerShape) -> Iterator[Arguments]:
    """Positions of the pool out of order, with others between."""
    random = _Random(shape)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for slots in ([5], [9, 0, 3]):
        cos, sin = (random(len(slots), shape.head_dim // 2).repeat(1, 2) for _ in range(2))
        pool, scales = _stored(shape, random(2, shape.kv_heads, 12, shape.head_dim))
        qkv = random(len(slots), width)
        if scales is not None:
            qkv[0, -1] = 2 * LARGEST * scales[1, -1]  # more than a value can be
        yield qkv, cos, sin, torch.tensor(slots, device=shape.device), pool[0], pool[1], scales


def silu_trials(shape: LayerShape) -> Iterator[Arguments]:
    """One token, and several."""
    random = _Random(shape)
    for tokens in (1, 3):
        yield (random(tokens, 2 * shape.intermediate),)


def decode_trials(shape: LayerShape, page_size: int, *, alibi: bool) -> Iterator[Arguments]:
    """Pages out of order, with and without a window; what no sequence owns is NaN."""
    random = _Random(shape)
    used = [1, page_size, 3 * page_size + 1, max(70, 5 * page_size)]
    pages = [-(-count // page_size) for count in used]
    order = torch.split_with_sizes(torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)), pages)
    table = torch.zeros(len(used), max(pages), dtype=torch.int32)
    pool = random(2, shape.kv_heads, (sum(pages) + 1) * page_size, shape.head_dim)
    for index, (own, count) in enumerate(zip(order, used, strict=True)):
        table[index, : len(own)] = own
        unused = len(own) * page_size - count
        if unused:
            start = (int(own[-1]) + 1) * page_size
            pool[:, :, start - unused : start] = torch.nan
    pool[:, :, -page_size:] = torch.nan
    pool, scales = _stored(shape, pool)
    query = random(len(used), shape.heads, shape.head_dim)
    slopes = torch.linspace(0.1, 0.8, shape.heads, device=shape.device) if alibi else None
    on_device = (table.to(shape.device), torch.tensor(used, dtype=torch.int32, device=shape.device))
    for window in (None, 9):
        yield query, pool[0], pool[1], *on_device, page_size, None, window, slopes, scales


def prefill_trials(shape: LayerShape, *, alibi: bool) -> Iterator[Arguments]:
    """Prompts and later pieces of one, with and without a window."""
    random = _Random(shape)
    slopes = torch.linspace(0.1, 0.8, shape.heads, device=shape.device) if alibi else None
    for tokens, count in ((5, 5), (70, 70), (33, 150)):
        pool, scales = _stored(shape, random(2, shape.kv_heads, count, shape.head_dim))
        query = random(tokens, shape.heads, shape.head_dim).transpose(0, 1)
        for window in (None, 40):
            yield query, pool[0], pool[1], None, window, slopes, scales


def tower_trials(shape: LayerShape) -> Iterator[Arguments]:
    """Tiles of few and of many patches."""
    random = _Random(shape)
    for tokens in (5, 150):
        query, keys, values = (random(shape.heads, tokens, shape.head_dim) for _ in range(3))
        yield query, keys, values, None, None, None, None, False


def top_p_trials(device: torch.device) -> Iterator[Arguments]:
    """Shares from small to all, tokens that cannot come, and more than one block of the vocabulary."""
    random = _Random(LayerShape(0, 0, 0, 0, 0, torch.float32, device))
    top_p = torch.tensor([1e-6, 0.3, 0.9, 0.999, 1.0], device=device)
    noise = torch.tensor([0.5, 0.0, 0.77, 0.31, 0.93], dtype=torch.float64, device=device)
    for vocabulary in (50, 9001):
        logits = 3 * random(len(top_p), vocabulary)
        yield logits.masked_fill(random(*logits.shape) > 1, float("-inf")), top_p, noise
