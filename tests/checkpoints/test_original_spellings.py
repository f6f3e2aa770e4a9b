"""Checkpoints on the hub in the original's layout, in the spelling of their files: small random ones that compute what
transformers' LLaVA computes of the same weights, and those under whose names the golden ones answer."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from support import tiny_tokenizers
from support.hub_models import LLAMA_3, MODELS, PHI_3
from support.next_checkpoints import CHECKPOINTS, Next, write_next
from support.paths import GOLDEN
from support.scenes import picture
from support.variants import all_logits, edit

QUERY = "What is shown in this image?"
_XTUNER = {"model_type": "llava_llama", "image_aspect_ratio": "pad", "unfreeze_mm_vision_tower": True}
"""As its convert_xtuner_weights_to_llava.py writes them: the language model's keys, and the tower inside."""


def phi_3() -> PreTrainedTokenizerFast:
    return _with(PHI_3, tiny_tokenizers.llama(32000, tiny_tokenizers.PHI_3, space="first"))


def llama_3() -> PreTrainedTokenizerFast:
    return _with(LLAMA_3, tiny_tokenizers.llama_3())


def _with(template: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


_llava = partial(Next, tower="clip", newline=False)
_xtuner = partial(_llava, architecture="LlavaLlamaForCausalLM", config=_XTUNER)
_SHARE_GPT4V = {"model_type": "share4v", "image_aspect_ratio": "pad"}
"""Its tower is in a repository of its own."""
HUB = {
    "Lin-Chen/ShareGPT4V-13B": _llava(
        "llama",
        32000,
        "Share4VLlamaForCausalLM",
        tokenizer=tiny_tokenizers.llama,
        text={"max_position_embeddings": 4096, "num_attention_heads": 8, "num_key_value_heads": 8},
        config=_SHARE_GPT4V,
        tower_inside=False,
    ),
    "xtuner/llava-llama-3-8b-v1_1-hf": _xtuner(
        "llama", 128256, tokenizer=llama_3, text=CHECKPOINTS["llama3-llava-next-8b"].text
    ),
    "xtuner/llava-phi-3-mini": _xtuner(
        "llama", 32064, tokenizer=phi_3, text={"max_position_embeddings": 4096, "sliding_window": 2047}
    ),
    "lmms-lab/llava-next-interleave-qwen-0.5b": dataclasses.replace(
        CHECKPOINTS["llava-onevision-qwen2-0.5b-ov"],
        config={
            "model_type": "llava_qwen",
            "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
            "image_aspect_ratio": "pad",
            "mm_patch_merge_type": "flat",
        },
        newline=False,
    ),
}


def as_hf_llava(folder: Path) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with a folder's weights, in float32: SigLIP's layers end before the last."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tower = folder.parent / config["mm_vision_tower"].removeprefix("../")
    vision = AutoConfig.from_pretrained(tower).vision_config
    is_siglip = vision.model_type == "siglip_vision_model"
    if is_siglip:
        vision.num_hidden_layers, vision.vision_use_head = vision.num_hidden_layers - 1, False
    kind = "qwen2" if "Qwen" in config["architectures"][0] else "llama"
    settings = {
        k: v for k, v in config.items() if not k.startswith(("mm_", "image_", "tokenizer")) and k != "model_type"
    }
    text = AutoConfig.for_model(kind, **{**settings, "vocab_size": weights["model.embed_tokens.weight"].shape[0]})
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=text.vocab_size - 1,
            vision_feature_layer=-1 if is_siglip else -2,
            vision_feature_select_strategy="full" if is_siglip else "default",
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )
    named = (
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("lm_head.", "lm_head."),
    )
    if not any("vision_tower" in name for name in weights):
        outside = load_file(tower / "model.safetensors").items()
        start = "model.vision_tower.vision_tower."
        weights |= {start + name: tensor.float() for name, tensor in outside if name.startswith("vision_model.")}
    state = {_renamed(name, named): tensor for name, tensor in weights.items()}
    if text.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state)
    rotary = model.model.language_model.rotary_emb  # the original's tables are in half precision
    rotary.register_forward_hook(lambda module, inputs, tables: tuple(table.half().float() for table in tables))
    return model.float().eval()


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in pairs:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return "model.language_model." + name.removeprefix("model.")


@torch.inference_mode()
def expected_logits(folder: Path, processor: Processor, prepared: Any) -> Tensor:
    model = as_hf_llava(folder)
    image = model.config.image_token_id
    ids = torch.from_numpy(np.where(prepared.token_ids < 0, image, prepared.token_ids).astype(np.int64))
    mean, std = (torch.tensor(values) for values in (processor.spec.image.mean, processor.spec.image.std))
    pixels = ((torch.from_numpy(prepared.tiles[0]) / 255 - mean) / std).permute(0, 3, 1, 2)
    found: Tensor = model(input_ids=ids[None], pixel_values=pixels).logits[0]
    return found


@pytest.mark.extended
@pytest.mark.parametrize("hub_id", HUB)
def test_the_same_weights_in_transformers_layout(hub_id: str, tmp_path: Path) -> None:
    assert any(hub_id in model.ids for model in MODELS)
    folder = write_next(tmp_path, hub_id.split("/")[1], HUB[hub_id])
    spec = open_checkpoint(str(folder))
    processor = Processor(spec, ImageOptions())
    prepared = processor.prepare_query(QUERY, [picture(300, 200)])
    got, expected = all_logits(Llava.load(spec), prepared), expected_logits(folder, processor, prepared)
    torch.testing.assert_close(got, expected[:, : got.shape[1]], atol=2e-3, rtol=0)
    if "xtuner" in hub_id:
        assert spec.conv_mode == "chat_template"
        talk = [{"role": "user", "content": f"<image>\n{QUERY}"}]
        theirs = HUB[hub_id].tokenizer()
        assert prepared.prompt == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    else:
        assert spec.conv_mode == ("qwen_1_5" if "qwen" in hub_id else "llava_v1")


SAME_FILES = {
    "llava-onevision-qwen2-7b-ov": ("7b-si", "7b-ov-chat", "72b-si", "72b-ov-sft", "72b-ov-chat"),
    "llava-onevision-qwen2-0.5b-ov": ("0.5b-si",),
}
"""The sizes differ; the keys, the tokenizer and the names of the tensors are those of the golden checkpoint."""


@pytest.mark.extended
@pytest.mark.parametrize("kind", SAME_FILES)
def test_other_names_of_the_golden_checkpoints(kind: str, tmp_path: Path) -> None:
    suite = json.loads((GOLDEN / "next" / "cases.json").read_text())[kind]
    folder = write_next(tmp_path, kind)
    for name in SAME_FILES[kind]:
        hub_id = f"lmms-lab/llava-onevision-qwen2-{name}"
        assert any(hub_id in model.ids for model in MODELS)
        folder = folder.rename(tmp_path / hub_id.split("/")[1])
        spec = open_checkpoint(str(folder))
        prepared = Processor(spec, ImageOptions()).prepare_query(QUERY, [picture(80, 60)])
        assert (prepared.input_ids, prepared.num_tokens) == (suite["small"]["ids"], suite["small"]["length"])


@pytest.mark.parametrize("files", [("config.json",), ("llm_adapter/adapter_config.json",)], ids=["whole", "adapter"])
def test_xtuners_own_layout_is_refused_by_name(files: tuple[str, ...], llava_15: Path) -> None:
    """What its training leaves: a language model or an adapter, and the projector in a folder of its own."""
    (llava_15 / "projector").mkdir()
    (llava_15 / "projector" / "config.json").write_text(json.dumps({"model_type": "projector"}))
    open_checkpoint(str(llava_15))  # a LLaVA beside it is one
    if "config.json" in files:
        edit(llava_15 / "config.json", architectures=["Phi3ForCausalLM"], model_type="phi3")
        edit(llava_15 / "config.json", mm_projector_type=None, mm_vision_tower=None)
    else:
        (llava_15 / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"xtuner's own layout.*convert_xtuner_weights_to_llava\.py"):
        open_checkpoint(str(llava_15))
