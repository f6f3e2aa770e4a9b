"""A decoder through torch.compile, for CPUs: it fuses the many small operations between the matrix products.

What cannot be traced is a custom operator in the graph: attention, which writes to the KV pool, and the packed linear
layers (`packed_linear`). The attention operator takes its step from a thread-local variable.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import Unsupported
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from transformers import AttentionInterface

from llava_serve.engine.executor.attention import Step, refuse_arguments

IMPLEMENTATION = "llava_serve_compiled"
"""The name under which transformers' models find the attention that can be compiled."""
MIN_TOKENS = 2
"""Fewest tokens of a step: torch specializes a graph to a size of one."""
SMALL_STEP_TOKENS = 32
"""Up to this number of tokens the graph's own loops run on one thread: waking the others costs more than they save."""

DummyStep = Callable[[int], tuple[torch.Tensor, Step]]
"""Makes embeddings [tokens, hidden] and a step of a number of tokens; it changes no sequence."""

NO_COMPILER = "there is no C++ compiler (g++)"

_running = threading.local()

torch.library.define(
    "llava_serve::attend", "(Tensor query, Tensor key, Tensor value, int layer, float scaling, int? window) -> Tensor"
)


@torch.library.impl("llava_serve::attend", "CPU")
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float, window: int | None
) -> torch.Tensor:
    step: Step = _running.step
    return step.attend(layer, query, key, value, scaling, window).contiguous()


@torch.library.register_fake("llava_serve::attend")  # type: ignore[untyped-decorator]
def _attended(query: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty((batch, tokens, heads, head_dim))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`Step.attend` of the running step, in the form of transformers' `AttentionInterface`."""
    refuse_arguments(others)
    return torch.ops.llava_serve.attend(query, key, value, module.layer_idx, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, attend)


class CompileError(Exception):
    """A decoder cannot be compiled. The message is the end of a sentence, `since ...`."""


class CompiledDecoder:
    """A decoder as two graphs with a dynamic number of tokens, at least `MIN_TOKENS`: for small and for large steps.

    It is a copy over the same weights, with a config of its own, where transformers' models read which attention to
    call: the decoder itself can run meanwhile, also in another thread.

    Args:
        decoder: one of transformers' models without its head. Its weights must not be replaced any more.
        options: of torch.compile beside ours.

    Raises:
        CompileError: the decoder cannot be copied.
    """

    def __init__(self, decoder: Any, **options: Any) -> None:
        try:
            own = copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
        except Exception as error:  # whatever a model may hold
            raise CompileError("the language model cannot be copied") from error
        own.set_attn_implementation(IMPLEMENTATION)

        def forward(embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = own(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False
            ).last_hidden_state
            return hidden

        # guards on the hundreds of modules and weights would be checked in every step
        common = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe} | options
        self._small, self._large = (
            torch.compile(forward, fullgraph=True, isolate_recompiles=True, options=common | {"cpp.threads": threads})  # type: ignore[call-overload]
            for threads in (1, torch.get_num_threads())
        )

    @torch.inference_mode()
    def warm_up(self, dummy_step: DummyStep) -> None:
        """Compiles both graphs.

        Raises:
            CompileError: there is no compiler, it fails, or the decoder cannot be traced.
        """
        try:
            for size in (SMALL_STEP_TOKENS, 2 * SMALL_STEP_TOKENS):
                embeddings, step = dummy_step(size)
                inputs, positions = embeddings[None], step.positions[None]
                torch._dynamo.mark_dynamic(inputs, 1)
                torch._dynamo.mark_dynamic(positions, 1)
                self._run(inputs, positions, step)
        except InductorError as error:
            if isinstance(error.inner_exception, InvalidCxxCompiler):
                raise CompileError(NO_COMPILER) from None
            if isinstance(error.inner_exception, CppCompileError):
                raise CompileError("the C++ compiler does not compile torch's code") from error
            raise
        except Unsupported as error:
            raise CompileError("torch.compile does not support this language model") from error

    def forward(self, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of input embeddings [tokens, hidden], at least `MIN_TOKENS`."""
        return self._run(embeddings[None], step.positions[None], step)[0]

    def _run(self, inputs: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        graph = self._small if inputs.shape[1] <= SMALL_STEP_TOKENS else self._large
        _running.step = step
        try:
            hidden: torch.Tensor = graph(inputs, positions)
        finally:
            del _running.step  # and with it the KV pool
        return hidden
