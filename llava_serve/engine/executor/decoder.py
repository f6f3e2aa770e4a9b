"""A transformers language model with the engine's attention."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import MptForCausalLM
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from llava_serve.engine.executor import attention
from llava_serve.engine.executor.attention import PackedStep, Step
from llava_serve.engine.executor.compiled import MIN_TOKENS, CompiledDecoder, CompileError, DummyStep
from llava_serve.engine.executor.kv_pool import PackedSequence
from llava_serve.engine.executor.llama_decoder import LlamaDecoder
from llava_serve.engine.executor.output_head import output_head
from llava_serve.errors import CheckpointError
from llava_serve.model.float8 import Float8Linear

_logger = logging.getLogger(__name__)

MAX_SMALL = 40
"""Most tokens of a step that `Decoder.native` computes: of more, oneDNN's products are faster."""
MAX_PROMPT_KEYS = 16_384
"""Most keys that its prompts' tokens attend to, in sum: of more, attention of several tokens at once is faster."""


class SmallSteps(Protocol):
    """See `native_decoder.NativeDecoder`."""

    windows: set[int | None]

    def forward(self, embeddings: torch.Tensor, step: PackedStep) -> torch.Tensor: ...


class Decoder:
    """A causal language model over packed steps.

    Most call the attention through transformers' `AttentionInterface`, and pass on the step from their own arguments.
    MPT supports neither: its attention modules are replaced. The Llama family has a decoder of our own on CUDA.

    Args:
        language_model: one of transformers' causal LMs; its attention is replaced permanently.
        float8: the KV pool has 8-bit floats.
    """

    compiled: CompiledDecoder | None = None
    """Computes the steps instead, from the moment that it is set. Its `warm_up` has returned."""
    native: SmallSteps | None = None
    """Computes steps of few tokens, from the moment that it is set."""

    def __init__(self, language_model: Any, *, float8: bool = False) -> None:
        self._language_model = language_model
        self._decoder = language_model.base_model
        self._head = output_head(language_model)
        self._replaced: list[_MptAttention] = []
        self._extra: dict[str, torch.Tensor] = {}
        self._llama: LlamaDecoder | None = None
        whole = all(parameter.is_floating_point() for parameter in language_model.parameters())
        whole &= not any("forward" in vars(module) for module in language_model.modules())  # compressed-tensors
        floats = whole and not any(isinstance(module, Float8Linear) for module in language_model.modules())
        self.has_float_weights = floats
        """No layer is quantized."""
        if isinstance(language_model, MptForCausalLM):
            for block in self._decoder.blocks:
                if isinstance(block.attn, MptAttention):
                    block.attn = _MptAttention(block.attn, language_model.device)
                self._replaced.append(block.attn)
            # a mask of four dimensions is passed on unchanged, and no unused [tokens, tokens] mask is built
            self._extra["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=language_model.device)
        else:
            language_model.set_attn_implementation(attention.IMPLEMENTATION)
            if floats and LlamaDecoder.supports(language_model):
                self._llama = LlamaDecoder(language_model, float8=float8)
        self.capturable = whole
        """Its steps can be captured as CUDA graphs: it has no quantized layers of bitsandbytes' or of a quantizer's,
        whose kernels synchronize."""
        self.has_alibi = bool(self._replaced)

    @property
    def name(self) -> str:
        """Which code computes it, for the check at load."""
        kind = " compiled" if self.compiled else " fused" if self._llama else ""
        return f"{self._language_model.config._attn_implementation}{kind}"

    @property
    def min_tokens(self) -> int:
        """Fewest tokens of a step."""
        return MIN_TOKENS if self.compiled else 1

    @property
    def never_compiled(self) -> str:
        """Why torch.compile is not applied to it; empty where it may be."""
        if not self.has_float_weights:
            return "its layers are quantized"
        return "its attention is not compiled" if self._replaced else ""

    def compilable(self, **options: Any) -> CompiledDecoder:
        """What is to be warmed up, and set as `compiled`.

        Args:
            options: of torch.compile.

        Raises:
            CompileError: the decoder cannot be copied.
        """
        return CompiledDecoder(self._decoder, **options)

    def compile(self, dummy_step: DummyStep) -> None:
        """Compiles it at once, unless it is never compiled.

        Raises:
            CheckpointError: it cannot be compiled.
        """
        if self.never_compiled:
            _logger.info("The decoder is not compiled, since %s.", self.never_compiled)
            return
        try:
            compilable = self.compilable()
            compilable.warm_up(dummy_step)
        except CompileError as error:
            raise CheckpointError(
                f"`compile` cannot be used, since {error}; without it answers take longer."
            ) from error
        self.compiled = compilable

    def forward(self, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of input embeddings [tokens, hidden]."""
        if self.native is not None and isinstance(step, PackedStep) and _is_small(step.sequences) and step.pages:
            return self.native.forward(embeddings, step)
        if self.compiled is not None:
            return self.compiled.forward(embeddings, step)
        if self._llama is not None:
            return self._llama.forward(embeddings, step)
        for module in self._replaced:
            module.step = step
        output = self._decoder(
            inputs_embeds=embeddings[None],
            position_ids=step.positions[None],
            use_cache=False,
            step=step,
            **self._extra,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] in float32, or float64 where the model is, of hidden states [tokens, hidden]."""
        logits = self._head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def reference_logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] of a sequence's input embeddings [tokens, hidden], by the model's own attention."""
        with self._own_attention():
            logits: torch.Tensor = self._language_model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        return logits

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """The model's attention is its own: `eager`, which leaves no argument out."""
        if self._replaced:
            self._place_attention([module.original for module in self._replaced])
            yield
            self._place_attention(self._replaced)
        else:
            ours = self._language_model.config._attn_implementation
            self._language_model.set_attn_implementation("eager")
            yield
            self._language_model.set_attn_implementation(ours)

    def _place_attention(self, modules: Sequence[nn.Module]) -> None:
        """Sets MPT's attention modules, one per block."""
        for block, module in zip(self._decoder.blocks, modules, strict=True):
            block.attn = module


def _is_small(sequences: list[PackedSequence]) -> bool:
    """Which steps of those with a kernel in C++ `Decoder.native` computes."""
    prompts = [one for one in sequences if one.length > 1]
    keys = sum(one.length * (one.start + one.length) for one in prompts)
    return sum(one.length for one in sequences) <= MAX_SMALL and keys <= MAX_PROMPT_KEYS


class _MptAttention(nn.Module):
    """MPT's attention over the KV pool, with the weights of the module that it replaces."""

    step: Step

    def __init__(self, original: MptAttention, device: torch.device) -> None:
        super().__init__()
        self.original = original
        self.Wqkv, self.out_proj = original.Wqkv, original.out_proj
        self._heads, self._layer = original.n_heads, original.layer_idx
        self._scale, self._clip = original.softmax_scale, original.clip_qkv
        # the last two columns are -slope and 0
        self._slopes = -build_mpt_alibi_tensor(self._heads, 2, device=device)[:, 0, 0].contiguous()

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[1, tokens, hidden] -> the same. The bias and mask that MPT passes are not used."""
        packed = self.Wqkv(hidden_states)
        if self._clip:
            packed = packed.clamp(min=-self._clip, max=self._clip)
        query, key, value = packed.unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.step.attend(self._layer, query, key, value, self._scale, slopes=self._slopes)
        return self.out_proj(out.flatten(2)), None
