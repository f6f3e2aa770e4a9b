"""Checkpoints that were saved quantized answer as transformers' own classes do with the same files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.offload import remove_dispatch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.cli import main
from llava_serve.config import EngineOptions
from llava_serve.engine.executor.build import resolve_dtype
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.packed_linear import PackedLinear, pack_linears
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from llava_serve.model.quantized import quantized_bytes
from llava_serve.types import IMAGE_TOKEN_ID
from support.hf_reference import Reference, said
from support.hub_spelling import write_json
from support.quantized_files import PLAIN, quantized_folders, write_bitsandbytes
from support.scenes import picture
from support.tiny_hf import MODELS, write_model

FILES = {
    "llava-1.5-llama-4bit": "4 bit",
    "llava-next-mistral-4bit": "4 bit",
    "onevision-4bit": "4 bit",
    "onevision-4bit-skip": "4 bit",
    "llava-1.5-llama-8bit": "8 bit",
    "onevision-8bit": "8 bit",
    "llava-1.5-llama-fp8": "FP8",
    "llava-next-mistral-fp8": "FP8",
}
ONE_THREAD = EngineOptions(num_threads=1)
GREEDY = SamplingParams(temperature=0, max_new_tokens=10)
TALKS = {
    "small": [said("user", "What is shown in this image?", picture(30, 30))],
    "portrait": [said("user", "  Is the circle\nleft of the square?  ", picture(97, 140))],
    "text-only": [said("user", "How many of them are there?")],
    "two-images": [said("user", "Which one is larger?", picture(120, 80), picture(30, 44))],
    "two-turns": [
        said("user", "What is it?", picture(90, 150)),
        said("assistant", "A red one."),
        said("user", "And this?", picture(64, 20)),
    ],
}


@pytest.fixture(scope="module")
def folder_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return quantized_folders(tmp_path_factory.mktemp("quantized"))


EVERY_DAY = {name: () if name.startswith("llava-1.5") else (pytest.mark.extended,) for name in FILES}


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in EVERY_DAY.items()])
def test_ids_and_greedy_tokens(name: str, folder_for: Any) -> None:
    folder = folder_for(name)
    llm = LLM(str(folder), device="cpu", dtype="float32", engine=ONE_THREAD)
    reference = Reference(folder, PLAIN[name.removesuffix("-skip").rpartition("-")[0]])
    if FILES[name] == "FP8":  # whose dispatch turns what the tower returns into a dictionary: transformers' NeXT fails
        reference.model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        remove_dispatch(reference.model, onload_tensors=True)
    for talk in TALKS.values():
        result = llm.chat(talk, GREEDY)
        inputs = reference.inputs(talk)
        prompt = inputs["input_ids"][0]
        ids = llm.processor.prepare(llm.processor.read(talk)).token_ids
        ids = np.where(ids == IMAGE_TOKEN_ID, reference.model.config.image_token_id, ids)
        assert ids.tolist() == prompt.tolist()
        if FILES[name] != "8 bit":
            generated = reference.model.generate(**inputs, max_new_tokens=10, do_sample=False)
            assert list(result.token_ids) == generated[0, len(prompt) :].tolist()
            continue
        # LLM.int8 rounds what it multiplies: the last bit of an input may change a logit by some percent.
        answer = torch.tensor([result.token_ids])
        whole = {"input_ids": torch.cat([inputs["input_ids"], answer], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        with torch.inference_mode():
            logits = reference.model(**(dict(inputs) | whole)).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(-1, answer[0, :, None])[:, 0]
        assert (behind <= 0.1 * logits.std(-1)).all()


def test_the_layers_are_those_of_the_quantizer(folder_for: Any) -> None:
    model = Llava.load(open_checkpoint(str(folder_for("llava-1.5-llama-fp8"))))
    decoder = model.language_model
    pack_linears(model)
    assert [type(module) for name, module in decoder.named_modules() if name.endswith("_proj")] == 7 * 2 * [nn.Linear]
    assert not Decoder(decoder).has_float_weights  # not compared bit by bit
    assert Decoder(decoder).never_compiled == "its layers are quantized"
    assert isinstance(decoder.lm_head, PackedLinear)
    assert all(isinstance(model.projector[index], PackedLinear) for index in (0, 2))
    first = decoder.model.layers[0].mlp.up_proj
    inputs = torch.ones(2, 64)
    inputs[:, 0] = 448  # the largest of a token decides how its others are rounded
    inputs[1, 1] = 1.01
    assert torch.equal(*first(inputs))


def test_widths_that_bitsandbytes_cannot_pack(tmp_path: Path) -> None:
    write_model(tmp_path / "plain", MODELS["llava-1.5-llama"])
    write_bitsandbytes(tmp_path / "quantized", tmp_path / "plain", 4, torch.float32, skipped=None)
    answers = [
        LLM(str(tmp_path / name), device="cpu", dtype="float32", engine=ONE_THREAD).chat(TALKS["small"], GREEDY)
        for name in ("plain", "quantized")
    ]
    assert answers[0].prompt == answers[1].prompt
    assert all(answer.token_ids for answer in answers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_the_dtype_follows_the_file(kind: str, dtype: torch.dtype, folder_for: Any) -> None:
    folder = folder_for(f"llava-1.5-llama-{kind}", dtype)
    spec = open_checkpoint(str(folder))
    assert resolve_dtype("auto", torch.device("cpu"), spec.torch_dtype, quantized=True) == dtype
    assert resolve_dtype("float32", torch.device("cpu"), spec.torch_dtype, quantized=True) == torch.float32
    result = LLM(str(folder), device="cpu", engine=ONE_THREAD).chat(TALKS["small"], GREEDY)
    assert len(result.token_ids) == 10
    other = Llava.load(spec, dtype=torch.float32)
    assert {parameter.dtype for parameter in other.parameters() if parameter.is_floating_point()} == {torch.float32}
    assert LLM(str(folder), device="cpu", dtype="float32", engine=ONE_THREAD).chat(TALKS["small"], GREEDY).token_ids


def changed(folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy whose tensors were changed."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


NORM = "language_model.model.layers.1.input_layernorm.weight"
QUERY = "language_model.model.layers.0.self_attn.q_proj"
SCALES = {"4bit": "weight.absmax", "8bit": "SCB", "fp8": "weight_scale"}


@pytest.mark.parametrize("what", ["norm", "scales", "layer", "surplus", "shape", "NaN", "empty file"])
@pytest.mark.parametrize("kind", SCALES)
def test_tensors_that_do_not_fit_are_refused(kind: str, what: str, folder_for: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if what == "norm":
            del tensors[NORM]
        elif what == "scales":
            del tensors[f"{QUERY}.{SCALES[kind]}"]
        elif what == "layer":
            for name in [name for name in tensors if name.startswith(QUERY)]:
                del tensors[name]
        elif what == "surplus":
            tensors["language_model.model.layers.2.input_layernorm.weight"] = tensors[NORM].clone()
        elif what == "shape":
            tensors[NORM] = tensors[NORM][:-1].clone()
        elif what == "NaN":
            tensors[NORM][3] = torch.nan
        else:
            tensors.clear()

    folder = changed(folder_for(f"llava-1.5-llama-{kind}"), tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        LLM(str(folder), device="cpu", dtype="float32", engine=ONE_THREAD)
    # transformers reads the scales of bitsandbytes with their layer, and fails.
    words = {"surplus": "surplus are", "shape": "of another shape are", "NaN": "NaN or infinity"}
    if what == "scales" and kind != "fp8":
        assert "a file is damaged" in str(caught.value)
    else:
        assert words.get(what, "missing are") in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", SCALES)
def test_the_memory_that_is_asked_for(kind: str, folder_for: Any) -> None:
    folder = folder_for(f"llava-1.5-llama-{kind}")
    spec = open_checkpoint(str(folder))
    model = Llava.load(spec)
    asked = quantized_bytes(model, spec, torch.float32)
    kept = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if kind == "fp8":  # unpacked, with its scales
        assert 0.98 < asked / kept <= 1
        return
    scales = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()) - asked
    assert scales == 0
    assert kept < asked < 1.6 * kept  # tiny layers have large tables
    halves = quantized_bytes(model, spec, torch.float16)
    packed = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values() if tensor.itemsize == 1)
    assert halves == packed + (asked - packed) // 2


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "AWQ without its package": ({"quant_method": "awq", "bits": 4}, {}, r"\(awq, 4 bit\), which needs gptqmodel;"),
    "GPTQ without its packages": ({"quant_method": "gptq", "bits": 4}, {}, "which needs optimum and gptqmodel;"),
    "another quantizer": ({"quant_method": "hqq"}, {}, "quantized by 'hqq'; supported are bitsandbytes"),
    "no quantizer": ({"bits": 4}, {}, "quantized by 'None'"),
    "another format": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {},
        "'pack-quantized'; its FP8",
    ),
    "quantized twice": (
        {"load_in_4bit": True},
        {"quantization": "8bit"},
        r"quantized already \(bitsandbytes, 4 bit\); leave --load-8bit, --load-4bit and --load-fp8",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str, folder_for: Any, tmp_path: Path) -> None:
    settings, options, sentence = REFUSED[what]
    folder = Path(shutil.copytree(folder_for("llava-1.5-llama-4bit"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization_config": settings})
    with pytest.raises(CheckpointError, match=sentence):
        LLM(str(folder), device="cpu", engine=ONE_THREAD, **options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bitsandbytes", "4bit"), ("compressed_tensors", "fp8"), ("compressed_tensors.compressors", "fp8")],
)
def test_a_package_that_is_absent_is_named(
    name: str, kind: str, folder_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_for(f"llava-1.5-llama-{kind}")
    monkeypatch.setitem(sys.modules, name, None)  # how Python marks a module that cannot be imported
    with pytest.raises(CheckpointError, match=f"which needs {name.replace('_', '-')}; install it"):
        LLM(str(folder), device="cpu", engine=ONE_THREAD)


def test_an_adapter_beside_quantized_weights_is_refused(folder_for: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_for("llava-1.5-llama-4bit"), tmp_path / "copy"))
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "elsewhere"})
    with pytest.raises(CheckpointError, match="an adapter merges into plain ones"):
        open_checkpoint(str(folder))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.move(folder / "adapter_config.json", adapter)
    with pytest.raises(CheckpointError, match=r"an adapter merges into plain ones: .*--model-base"):
        open_checkpoint(str(adapter), model_base=str(folder))


def test_a_pickle_is_refused(folder_for: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_for("llava-1.5-llama-4bit"), tmp_path / "copy"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"from safetensors only; .* has pytorch_model\.bin"):
        Llava.load(open_checkpoint(str(folder)))


def test_the_awq_files_of_2023_are_named(folder_for: Any, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    write_model(folder, MODELS["llava-1.5-llama"])
    write_json(folder / "quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True})
    with pytest.raises(CheckpointError, match=r"quant_config\.json, .* AWQ's in the files of 2023"):
        open_checkpoint(str(folder))


def test_the_files_of_mlx_are_named(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("llava-1.5-llama"), tmp_path / "llava"))
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization": {"group_size": 64, "bits": 4}})
    with pytest.raises(CheckpointError, match=r"weights are MLX's, .*--load-4bit"):
        open_checkpoint(str(folder))


def test_inspect_shows_it(folder_for: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in (("4bit", "bitsandbytes, 4 bit"), ("fp8", "compressed-tensors, FP8")):
        assert main(["inspect", "--json", str(folder_for(f"llava-1.5-llama-{name}"))]) == 0
        assert json.loads(capsys.readouterr().out)["quantized"] == [f"in the files, by {line}"]


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_weights_that_are_called_quantized_are_refused(bits: int, tmp_path: Path) -> None:
    write_model(tmp_path, PLAIN["llava-1.5-llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    write_json(tmp_path / "config.json", config | {"quantization_config": settings})
    with pytest.raises(CheckpointError, match=r"a file is damaged or does not fit its config\.json"):
        LLM(str(tmp_path), device="cpu", dtype="float32", engine=ONE_THREAD)
