"""A decoder that the engine computes otherwise than transformers is not loaded; a head is computed whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.output_head import output_head
from llava_serve.errors import CheckpointError
from llava_serve.sampling_params import SamplingParams
from support import tiny_engine
from support.tiny_engine import TinyModel, engine, prompt, reference_logits

_GEMMA_2 = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 0.5}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bounded scores": ("gemma2", _GEMMA_2),
    "sinks": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "a convolution's state": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "no step passed on": ("stablelm", {}),
}
SENTENCES = {
    "bounded scores": "softcap, which is not supported",
    "sinks": "s_aux, which is not supported",
    "a convolution's state": "does not compute the language model",
    "no step passed on": "cannot be computed in float32",
}
SCALED = {"granite": 1 / 8, "cohere": 0.0625, "cohere2": 0.0625}


@pytest.mark.parametrize("what", OTHERS)
def test_another_decoder_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_engine.CONFIGS, what, OTHERS[what])
    with pytest.raises(CheckpointError, match=SENTENCES[what]):
        engine(TinyModel(what, torch.float32))


@pytest.mark.extended
def test_a_compiled_decoder_with_bounded_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_engine.CONFIGS, "bounded", OTHERS["bounded scores"])
    with pytest.raises(CheckpointError, match=r"torch\.compile does not support"):
        engine(TinyModel("bounded", torch.float32), compile=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["scaling", "window", "values"])
def test_wrong_attention_is_found(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PackedStep.attend

    def wrong(self: PackedStep, layer: int, query: Any, key: Any, value: Any, scaling: Any, window: Any = None) -> Any:
        scaling = scaling / 3 if fault == "scaling" else scaling
        window = None if fault == "window" else window
        value = value.flip(1) if fault == "values" else value
        return attend(self, layer, query, key, value, scaling, window)

    engine(TinyModel("mistral", dtype))
    monkeypatch.setattr(PackedStep, "attend", wrong)
    with pytest.raises(CheckpointError, match=r"does not compute the language model of mistral .*%"):
        engine(TinyModel("mistral", dtype))


def test_a_wrong_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_serve.engine.executor.decoder.output_head", lambda model: model.get_output_embeddings())
    engine(TinyModel("llama"))
    with pytest.raises(CheckpointError, match="does not compute the language model of granite"):
        engine(TinyModel("granite"))


def test_what_is_not_finite_is_left_to_the_requests() -> None:
    model = TinyModel()
    model.language_model.get_input_embeddings().weight.data[40] = torch.nan
    engine(model)


@pytest.mark.parametrize("kind", ["llama", "mpt", "mistral", "qwen3", "gemma"])
def test_a_plain_head_is_the_linear_layer_alone(kind: str) -> None:
    assert isinstance(output_head(TinyModel(kind).language_model), nn.Linear)


@pytest.mark.parametrize("kind", [*SCALED, "gemma2-bounded-head"])
def test_logits_are_the_models_own(kind: str) -> None:
    """What temperature, top-p and logprobs depend on; a greedy answer does not."""
    model = TinyModel(kind)
    hidden = torch.randn(5, tiny_engine.HIDDEN, dtype=torch.float64)
    with torch.inference_mode():
        linear = model.language_model.get_output_embeddings()(hidden)
        found = output_head(model.language_model)(hidden)
    expected = linear * SCALED[kind] if kind in SCALED else 0.5 * torch.tanh(linear / 0.5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["granite", "cohere"])
def test_logprobs_are_of_the_scaled_logits(kind: str) -> None:
    one = prompt(1, [5, 6, 7])
    subject = engine(TinyModel(kind))
    subject.add(subject.validator.accept("r", one, SamplingParams(temperature=0, max_new_tokens=1, logprobs=3)))
    (output,) = subject.step()
    assert output.logprobs is not None
    expected = reference_logits(TinyModel(kind), one)[-1].log_softmax(-1)
    assert output.logprobs[0].logprob == pytest.approx(float(expected.max()), abs=1e-5)
