"""PEFT adapters over checkpoints of either layout: merged while loading, bit by bit as PEFT merges them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.weight_mapping import LAYOUTS, our_name
from llava_serve.model.llava import Llava
from support.variants import Weights, edit, read, refusal

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
BASE = "llava-1.5-llama-hub"
ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "the language model alone": {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
    "everything, rank-stabilized": {"target_modules": "all-linear", "use_rslora": True},
    "a whole projector": {"target_modules": ATTENTION, "modules_to_save": ["multi_modal_projector"]},
    "whole embeddings": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "whole embeddings and head": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows of the embeddings": {"target_modules": ATTENTION, "trainable_token_indices": [5, 7, 300]},
    "rows by module": {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [9]}},
}
OVER_A_TIED_HEAD = ("whole embeddings", "whole embeddings and head", "rows of the embeddings")
OLD_NAMES = (
    ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    ("base_model.model.lm_head.", "base_model.model.language_model.lm_head."),
    ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model."),
    ("base_model.model.model.multi_modal_projector.", "base_model.model.multi_modal_projector."),
)
"""As adapters have them that were trained with transformers 4."""


def make_adapter(base: Path, folder: Path, **settings: Any) -> Weights:
    """Saves a random adapter; returns the weights that PEFT merges it to, by this project's names."""
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **settings))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.05 if "lora_" in name else 0.3)
    adapted.save_pretrained(folder)
    fresh = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float16)
    merged: Any = PeftModel.from_pretrained(fresh, str(folder)).merge_and_unload()
    return {our_name(name, LAYOUTS["transformers"]) or "": t for name, t in merged.state_dict().items()}


def assert_merged(found: Llava, expected: Weights, folder: Path, base: Path) -> None:
    own = found.state_dict()
    assert {name for name in expected if "vision_tower" not in name} == {name for name in own if "tower" not in name}
    for name, tensor in own.items():
        assert torch.equal(tensor, expected[name].float()), name
    plain = Llava.load(open_checkpoint(str(base))).state_dict()
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in own.items())


@pytest.mark.parametrize("names", ["new", pytest.param("old", marks=pytest.mark.extended)])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_does(kind: str, names: str, folder_of: Any, tmp_path: Path) -> None:
    base, folder = folder_of(BASE), tmp_path / "adapter"
    expected = make_adapter(base, folder, **KINDS[kind])
    if names == "old":
        stored = load_file(folder / "adapter_model.safetensors")
        for new, old in OLD_NAMES:
            stored = {name.replace(new, old): tensor for name, tensor in stored.items()}
        save_file(stored, folder / "adapter_model.safetensors")
    spec = open_checkpoint(str(folder), model_base=str(base))
    assert (spec.name, spec.adapter, spec.layout, spec.base) == ("adapter", "lora", "transformers", base)
    assert open_checkpoint(str(folder), model_base=str(base), weights=False).image == spec.image
    assert_merged(Llava.load(spec), expected, folder, base)


@pytest.mark.filterwarnings("ignore:(?s).*tie_word_embeddings")
@pytest.mark.parametrize("kind", OVER_A_TIED_HEAD)
def test_merged_over_a_tied_head_as_peft_does(kind: str, folder_of: Any, tmp_path: Path) -> None:
    """PEFT trains a copy of the embeddings: the head that they were tied to stays what it was."""
    base, folder = folder_of("llava-1.5-full-tied"), tmp_path / "adapter"
    expected = make_adapter(base, folder, **KINDS[kind])
    assert_merged(Llava.load(open_checkpoint(str(folder), model_base=str(base))), expected, folder, base)


OVER_THE_ORIGINAL: dict[str, dict[str, Any]] = {
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "whole norms": {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm"]},
    **{name: KINDS[name] for name in ("whole embeddings and head", "rows of the embeddings", "rows by module")},
}


@pytest.mark.parametrize("kind", OVER_THE_ORIGINAL)
def test_merged_over_the_originals_layout(kind: str, lora: Path) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    expected = make_original_adapter(base, lora, **OVER_THE_ORIGINAL[kind])
    found = Llava.load(open_checkpoint(str(lora), model_base=str(base))).language_model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].float()), name


def make_original_adapter(base: Path, folder: Path, **settings: Any) -> Weights:
    """Puts a random adapter of PEFT in the place of the one in a folder; returns what PEFT merges it to, in half
    precision as the original."""
    for old in folder.glob("adapter_*"):
        old.unlink()
    torch.manual_seed(4)
    adapted = get_peft_model(half_llama(base), LoraConfig(r=4, lora_alpha=6, **settings))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.05 if "lora_" in name else 0.3)
    adapted.save_pretrained(folder)
    merged: Any = PeftModel.from_pretrained(half_llama(base), str(folder), autocast_adapter_dtype=False)
    return dict(merged.merge_and_unload().state_dict())


def half_llama(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16)


OTHER_KINDS: dict[str, dict[str, Any]] = {
    "use_dora": {"target_modules": ATTENTION, "use_dora": True},
    "rank_pattern": {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}},
    "alpha_pattern": {"target_modules": ATTENTION, "alpha_pattern": {"v_proj": 2}},
    "lora_embedding_A": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("what", OTHER_KINDS)
def test_other_kinds_are_refused_with_the_way_out(
    what: str, layout: str, lora: Path, folder_of: Any, tmp_path: Path
) -> None:
    if layout == "original":
        base, folder = lora.parent / "vicuna-v1.5-tiny", lora
        make_original_adapter(base, folder, **OTHER_KINDS[what])
    else:
        base, folder = folder_of(BASE), tmp_path / "adapter"
        make_adapter(base, folder, **OTHER_KINDS[what])
    message = refusal(folder, model_base=str(base))
    assert what in message
    assert "with PEFT and load the result" in message


def test_more_rows_than_the_base(folder_of: Any, tmp_path: Path) -> None:
    base, folder = folder_of(BASE), tmp_path / "adapter"
    make_adapter(base, folder, **KINDS["whole embeddings and head"])
    stored = load_file(folder / "adapter_model.safetensors")
    more = {name: torch.cat([t, t[:2]]) for name, t in stored.items() if t.shape[0] == 448}
    assert len(more) == 2
    save_file(stored | more, folder / "adapter_model.safetensors")
    model = Llava.load(open_checkpoint(str(folder), model_base=str(base)))
    assert model.language_model.get_input_embeddings().weight.shape == (450, 64)


def test_the_tokenizer_of_the_adapter_counts(folder_of: Any, tmp_path: Path) -> None:
    base, folder = folder_of(BASE), tmp_path / "adapter"
    make_adapter(base, folder, target_modules=ATTENTION)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    spec = open_checkpoint(str(folder), model_base=str(base))
    assert spec.tokenizer.folder == folder
    assert spec.chat_template is not None
    assert spec.chat_template.text == template


def test_refused_with_what_to_do(folder_of: Any, tmp_path: Path) -> None:
    base, folder = folder_of(BASE), tmp_path / "adapter"
    make_adapter(base, folder, target_modules=ATTENTION, trainable_token_indices=[5, 7])
    message = refusal(folder)
    assert "LoRA adapter" in message
    assert "--model-base" in message
    assert base.name in message
    edit(folder / "adapter_config.json", trainable_token_indices=[5])
    assert "trainable_token_indices" in refusal(folder, model_base=str(base))
    edit(folder / "adapter_config.json", trainable_token_indices=[5, 7])
    stored = load_file(folder / "adapter_model.safetensors")
    save_file(stored | {"base_model.model.model.norm.weight": torch.ones(64)}, folder / "adapter_model.safetensors")
    assert "modules_to_save" in refusal(folder, model_base=str(base))


def test_an_adapter_of_an_original_llava_needs_no_config(llava_15: Path, lora: Path, caplog: Any) -> None:
    """Its base is a LLaVA: config.json and the projector are there, too, and the latter is reported."""
    factors = torch.load(lora / "adapter_model.bin")
    torch.save({n: t for n, t in factors.items() if "layers.3" not in n}, lora / "adapter_model.bin")
    (lora / "config.json").unlink()
    (lora / "non_lora_trainables.bin").unlink()
    model = Llava.load(open_checkpoint(str(lora), model_base=str(llava_15)))
    assert "the projector is that of" in caplog.text
    weights = read(llava_15)
    assert torch.equal(model.get_parameter("projector.0.weight"), weights["model.mm_projector.0.weight"].float())
    plain = Llava.load(open_checkpoint(str(llava_15)))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(model.language_model.get_parameter(name), plain.language_model.get_parameter(name))


@pytest.mark.parametrize("where", ["beside", "above"])
def test_the_projector_of_an_adapter_may_lie_elsewhere(where: str, lora: Path, tmp_path: Path) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    before = Llava.load(open_checkpoint(str(lora), model_base=str(base))).state_dict()
    trained = torch.load(lora / "non_lora_trainables.bin")
    (lora / "non_lora_trainables.bin").unlink()
    assert "mm_projector.bin" in refusal(lora, model_base=str(base))
    if where == "above":
        edit(lora / "config.json", mm_vision_tower=str(lora.parent / "clip-vit-tiny-56"))
        (tmp_path / "run-lora").mkdir()
        lora = lora.rename(tmp_path / "run-lora" / "checkpoint-500")
    torch.save(trained, (lora if where == "beside" else lora.parent) / "mm_projector.bin")
    found = Llava.load(open_checkpoint(str(lora), model_base=str(base))).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_a_lora_on_a_tower_that_is_not_used_is_reported(lora: Path, caplog: Any) -> None:
    base = str(lora.parent / "vicuna-v1.5-tiny")
    before = Llava.load(open_checkpoint(str(lora), model_base=base)).state_dict()
    factors = torch.load(lora / "adapter_model.bin")
    rank = json.loads((lora / "adapter_config.json").read_text())["r"]
    module = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    factors |= {f"{module}.lora_A.weight": torch.ones(rank, 48), f"{module}.lora_B.weight": torch.ones(48, rank)}
    torch.save(factors, lora / "adapter_model.bin")
    found = Llava.load(open_checkpoint(str(lora), model_base=base)).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    assert "of a vision tower that is not used" in caplog.text


def test_a_tower_in_an_adapters_files_that_is_not_used_is_reported(lora: Path, caplog: Any) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    tower = read(lora.parent / "clip-vit-tiny-56")
    prefix = "model.vision_tower.vision_tower."
    trained = torch.load(lora / "non_lora_trainables.bin")
    inside = {f"base_model.model.{prefix}{n}": t.half() * 2 for n, t in tower.items() if n.startswith("vision_model.")}
    torch.save(trained | inside, lora / "non_lora_trainables.bin")
    plain = Llava.load(open_checkpoint(str(lora), model_base=str(base)))
    assert "the vision tower in its files is not used" in caplog.text
    edit(lora / "config.json", unfreeze_mm_vision_tower=True)
    tuned = Llava.load(open_checkpoint(str(lora), model_base=str(base)))
    left, right = (model.vision_tower.pre_layrnorm.weight for model in (plain, tuned))
    torch.testing.assert_close(left * 2, right, atol=2e-3, rtol=0)
