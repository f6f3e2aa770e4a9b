"""8-bit and 4-bit weights of the language model by bitsandbytes, and 8-bit floats, on a CPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.cache_scales import find_scales
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.model import kv_shape
from llava_serve.errors import CheckpointError
from llava_serve.model.float8 import Float8Linear, to_float8
from llava_serve.model.llava import Llava
from support.random_llava import write_llava
from support.tiny_hf import Tiny, write_model
from support.variants import all_logits, copy, input_embeddings, merged_by_peft, prepare, read, write

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install llava-serve[quantization]",
)
LAYERS = 8
LINEAR_LAYERS = 7 * LAYERS
# The least cosine that any position's logits may have with the unquantized model's; the bounds of the memory, with
# scales, embeddings and head, beside that in bfloat16.
EXPECTED = {"8bit": (0.998, (0.50, 0.53)), "4bit": (0.93, (0.25, 0.29)), "fp8": (0.99, (0.50, 0.53))}
KINDS = [pytest.param(name, marks=() if name == "fp8" else needs_bitsandbytes) for name in EXPECTED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 62 million parameters."""
    return write_llava(tmp_path_factory.mktemp("quantized") / "llava", hidden=768, intermediate=2304, layers=LAYERS)


def quantized_layers(module: nn.Module) -> list[str]:
    return [
        name
        for name, one in module.named_modules()
        if type(one).__name__ in ("Linear8bitLt", "Linear4bit", "Float8Linear")
    ]


def memory(module: nn.Module) -> int:
    """Bytes of the weights, and of the scales that quantized ones need."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(module))


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (one.scale for one in module.modules() if isinstance(one, Float8Linear))
    for parameter in module.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.state2.absmax)
        elif (scales := getattr(parameter, "SCB", None)) is not None:
            yield scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", KINDS)
def test_layers_memory_and_logits(folder: Path, quantization: Any, dtype: torch.dtype) -> None:
    spec = open_checkpoint(str(folder))
    plain, small = Llava.load(spec, dtype=dtype), Llava.load(spec, dtype=dtype, quantization=quantization)
    assert sum(parameter.numel() for parameter in plain.language_model.parameters()) > 60e6

    assert len(quantized_layers(small)) == LINEAR_LAYERS
    assert len(quantized_layers(small.language_model)) == LINEAR_LAYERS
    for part in ("vision_tower", "projector", "language_model.lm_head", "language_model.model.embed_tokens"):
        kept, before = small.get_submodule(part).state_dict(), plain.get_submodule(part).state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
        assert all(tensor.dtype == dtype for tensor in kept.values() if tensor.is_floating_point())

    cosine, (low, high) = EXPECTED[quantization]
    if dtype == torch.bfloat16:
        assert low < memory(small.language_model) / memory(plain.language_model) < high
    prepared = prepare(folder)
    similarity = functional.cosine_similarity(
        all_logits(small, prepared).float(), all_logits(plain, prepared).float(), dim=-1
    )
    assert cosine < float(similarity.min()) < 1 - 1e-6


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_logits_over_keys_and_values_in_8_bit_floats(folder: Path, dtype: torch.dtype) -> None:
    """Chunks of the prompt, and single tokens at its end, over a cache of each kind."""
    model = Llava.load(open_checkpoint(str(folder)), dtype=dtype)
    decoder, embeddings = Decoder(model.language_model), input_embeddings(model, prepare(folder))
    layers, kv_heads, head_dim = kv_shape(model)
    count, found = len(embeddings), []
    ends = [*range(0, count - 8, 16), *range(count - 8, count + 1)]
    for scales in (None, find_scales(model, decoder)):
        memory = KVPool(layers, kv_heads, count, head_dim, dtype, model.device, scales)
        parts = []
        for start, end in itertools.pairwise(ends):
            step = PackedStep(memory, [PackedSequence(0, end - start, 0, start)], dtype, model.device)
            parts.append(decoder.logits(decoder.forward(embeddings[start:end], step)))
        found.append(torch.cat(parts).float())
    assert len(found[0]) == count > 32
    similarity = functional.cosine_similarity(found[1], found[0], dim=-1)
    assert 0.997 < float(similarity.min()) < 1 - 1e-6
    expected = decoder.reference_logits(embeddings).float()
    assert float(functional.cosine_similarity(found[0], expected, dim=-1).min()) > 0.999


@pytest.mark.parametrize("quantization", KINDS)
def test_lora_is_merged_before_it_is_quantized(tmp_path: Path, quantization: Any) -> None:
    adapter, base = copy("llava-v1.5-tiny-lora", tmp_path), copy("vicuna-v1.5-tiny", tmp_path)
    merged = merged_by_peft(json.loads((base / "config.json").read_text()), read(base), adapter)
    projector = torch.load(adapter / "non_lora_trainables.bin")
    whole = copy("llava-v1.5-tiny", tmp_path)
    write(whole, merged | {name.removeprefix("base_model.model."): tensor for name, tensor in projector.items()})
    prepared = prepare(whole)
    models = [
        Llava.load(open_checkpoint(str(path), model_base=of), quantization=quantization)
        for path, of in ((adapter, str(base)), (whole, None))
    ]
    assert len(quantized_layers(models[0])) == 7 * 3
    assert torch.equal(all_logits(models[0], prepared), all_logits(models[1], prepared))
    plain = Llava.load(open_checkpoint(str(whole)))
    assert not torch.equal(all_logits(models[0], prepared), all_logits(plain, prepared))


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-mistral-tiny", "llava-mpt-tiny"])
def test_every_decoder_answers_through_the_engine(
    name: str, quantization: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(name, tmp_path)
    prepared = prepare(folder)
    model = Llava.load(open_checkpoint(str(folder)), quantization=quantization)
    with caplog.at_level(logging.WARNING, "bitsandbytes"):
        expected = int(all_logits(model, prepared)[-1].argmax())
        options = EngineOptions(num_threads=1, compile=True)  # quantized layers go without
        llm = LLM(str(folder), device="cpu", dtype="float32", quantization=quantization, engine=options)
        assert llm.run([prepared], SamplingParams(temperature=0, max_new_tokens=4))[0].token_ids[0] == expected
    assert not [record for record in caplog.records if "will be cast" in record.getMessage()]


@needs_bitsandbytes
def test_refused_in_double_precision(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="float32, bfloat16 or float16"):
        Llava.load(open_checkpoint(str(folder)), dtype=torch.float64, quantization="8bit")


@pytest.mark.parametrize("quantization", KINDS)
def test_weights_are_checked_before_they_are_quantized(quantization: Any, llava_15: Path) -> None:
    weights = read(llava_15)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    write(llava_15, weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .* NaN or infinity"):
        Llava.load(open_checkpoint(str(llava_15)), quantization=quantization)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_without_bitsandbytes_it_says_what_to_install(
    folder: Path, quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # how Python marks a module that cannot be imported
    with pytest.raises(CheckpointError, match=r"pip install llava-serve\[quantization\]"):
        Llava.load(open_checkpoint(str(folder)), quantization=quantization)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_stay_as_they_are_and_that_is_said(kind: Any, tmp_path: Path, caplog: Any) -> None:
    write_model(tmp_path / "mixture", Tiny("llava", "mixtral", text={"num_local_experts": 4, "intermediate_size": 128}))
    model = Llava.load(open_checkpoint(str(tmp_path / "mixture")), quantization=kind)
    assert len(quantized_layers(model.language_model)) == 2 * 4
    experts = [tensor for tensor in model.language_model.parameters() if tensor.ndim == 3]
    assert {tensor.dtype for tensor in experts} == {torch.float32}
    assert len(experts) == 2 * 2
    assert "experts of this mixture are not quantized: they stay in float32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_8_bit_floats_gives_what_its_rounded_numbers_give(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=bias, dtype=dtype)
    layer = Float8Linear(plain)
    layer.set_weight(plain.weight.detach(), torch.device("cpu"))
    inputs = torch.randn(shape, dtype=dtype)
    inputs[..., 0] *= 100  # of one token, whose scale the others do not share
    (rows, scales), (weight, weight_scales) = to_float8(inputs), to_float8(plain.weight.detach())
    assert float((rows.double() * scales - inputs).abs().max()) <= float(inputs.abs().max()) / 16
    expected = (rows.double() * scales) @ (weight.double() * weight_scales).T
    expected = expected.to(torch.bfloat16).to(dtype)
    with torch.inference_mode():
        found = layer(inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected if plain.bias is None else expected + plain.bias, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(number: float) -> None:
    layer = Float8Linear(nn.Linear(16, 16, bias=False))
    layer.set_weight(torch.eye(16), torch.device("cpu"))
    inputs = torch.ones(3, 16)
    inputs[1, 2] = number
    with torch.inference_mode():
        assert layer(inputs).isfinite().all(dim=-1).tolist() == [True, False, True]


def test_a_row_of_zeros_stays_one() -> None:
    rows, scales = to_float8(torch.zeros(2, 16))
    assert torch.equal(rows.float() * scales, torch.zeros(2, 16))
