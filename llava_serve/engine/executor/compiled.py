"""A decoder through torch.compile, for CPUs: the many small operations between its products become a few.

What cannot be traced stands in the graph as an operation of ours: attention, which writes to the KV memory and knows
the sequences of the step, and the packed products (`packing`). Attention finds its step on the thread that calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from transformers import AttentionInterface

from llava_serve.engine.executor.attention import Step
from llava_serve.errors import CheckpointError

IMPLEMENTATION = "llava_serve_compiled"
"""The name under which transformers' models find the attention that can be compiled."""
LEAST_ROWS = 2
"""Of a step: torch would make one row a graph of its own."""
FEW_ROWS = 32
"""Up to here the graph's own loops run on one thread: to wake the others costs more than they save."""

Trial = Callable[[int], tuple[torch.Tensor, Step]]
"""Gives embeddings [rows, hidden] and a step of so many rows that changes nothing."""

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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`Step.attend` of the step that runs, in the form of transformers' `AttentionInterface`."""
    return torch.ops.llava_serve.attend(query, key, value, module.layer_idx, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, attend)


class CompiledDecoder:
    """A decoder as two graphs, of any number of rows above one: for few rows and for many.

    Args:
        decoder: one of transformers' models without its head, with `IMPLEMENTATION` for attention. Its weights are not
            to change any more.
    """

    def __init__(self, decoder: nn.Module) -> None:
        def forward(embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = decoder(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False
            ).last_hidden_state
            return hidden

        # guards on the hundreds of modules and weights would be looked at in every step
        guards: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        self._few, self._many = (
            torch.compile(forward, fullgraph=True, isolate_recompiles=True, options=guards | more)  # type: ignore[call-overload]
            for more in ({"cpp.threads": 1}, {})
        )

    @torch.inference_mode()
    def warm_up(self, trial: Trial) -> None:
        """Writes both graphs.

        Raises:
            CheckpointError: there is no compiler.
        """
        try:
            for rows in (FEW_ROWS, 2 * FEW_ROWS):
                embeddings, step = trial(rows)
                inputs, positions = embeddings[None], step.positions[None]
                torch._dynamo.mark_dynamic(inputs, 1)
                torch._dynamo.mark_dynamic(positions, 1)
                self._run(inputs, positions, step)
        except InductorError as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler):
                raise
            message = "There is no C++ compiler (g++), which `compile` takes. Without it the model runs, more slowly."
            raise CheckpointError(message) from None

    def forward(self, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Last hidden states [rows, hidden] of input embeddings [rows, hidden], at least `LEAST_ROWS`."""
        return self._run(embeddings[None], step.positions[None], step)[0]

    def _run(self, inputs: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        graph = self._few if inputs.shape[1] <= FEW_ROWS else self._many
        _running.step = step
        try:
            hidden: torch.Tensor = graph(inputs, positions)
        finally:
            del _running.step  # and with it the KV memory
        return hidden
