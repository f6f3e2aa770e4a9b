"""Puts the engine's attention into a transformers language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MptForCausalLM
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from llava_serve.engine.executor import attention, compiled
from llava_serve.engine.executor.attention import Step


class Decoder:
    """A causal language model over packed steps.

    Llama, Mistral and Qwen2 find the attention through transformers' `AttentionInterface`, and the step among the
    arguments of their call. MPT looks for neither: its attention modules are replaced.

    Args:
        language_model: one of transformers' causal LMs; its attention is changed for good.
        compile: through torch.compile, on a CPU. MPT goes without, and so do quantized layers.
    """

    def __init__(self, language_model: Any, *, compile: bool = False) -> None:
        self._decoder = language_model.base_model
        self._head = language_model.get_output_embeddings()
        self._replaced: list[_MptAttention] = []
        self._extra: dict[str, torch.Tensor] = {}
        self._compiled: compiled.CompiledDecoder | None = None
        floats = all(parameter.is_floating_point() for parameter in language_model.parameters())
        if isinstance(language_model, MptForCausalLM):
            for block in self._decoder.blocks:
                if isinstance(block.attn, MptAttention):
                    block.attn = _MptAttention(block.attn, language_model.device)
                self._replaced.append(block.attn)
            # a mask of four dimensions is passed on as it is: it spares the [tokens, tokens] that nobody reads
            self._extra["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=language_model.device)
        elif compile and floats:
            language_model.set_attn_implementation(compiled.IMPLEMENTATION)
            self._compiled = compiled.CompiledDecoder(self._decoder)
        else:
            language_model.set_attn_implementation(attention.IMPLEMENTATION)
        self.recordable = floats and not self._replaced
        """Its steps can be CUDA graphs: no biased attention, and no quantized layers, whose kernels ask the host."""

    @property
    def least_rows(self) -> int:
        """Of a step."""
        return compiled.LEAST_ROWS if self._compiled else 1

    def warm_up(self, trial: compiled.Trial) -> None:
        """Compiles what is to be compiled.

        Raises:
            CheckpointError: there is no compiler.
        """
        if self._compiled is not None:
            self._compiled.warm_up(trial)

    def forward(self, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of input embeddings [tokens, hidden]."""
        if self._compiled is not None:
            return self._compiled.forward(embeddings, step)
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
        logits: torch.Tensor = self._head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


class _MptAttention(nn.Module):
    """MPT's attention over the engine's memory, with the weights of the module that it replaces."""

    step: Step

    def __init__(self, original: MptAttention, device: torch.device) -> None:
        super().__init__()
        self.Wqkv, self.out_proj = original.Wqkv, original.out_proj
        self._heads, self._layer = original.n_heads, original.layer_idx
        self._scale, self._clip = original.softmax_scale, original.clip_qkv
        # the last two columns are -slope and 0
        self._slopes = -build_mpt_alibi_tensor(self._heads, 2, device=device)[:, 0, 0]

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[1, tokens, hidden] -> the same; the bias and mask that MPT made are not used."""
        packed = self.Wqkv(hidden_states)
        if self._clip:
            packed = packed.clamp(min=-self._clip, max=self._clip)
        query, key, value = packed.unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.step.attend(self._layer, query, key, value, self._scale, slopes=self._slopes)
        return self.out_proj(out.flatten(2)), None
