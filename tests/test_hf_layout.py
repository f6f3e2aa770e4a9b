"""Checkpoints in transformers' layout answer as transformers' own classes do, with its PIL image processors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_tiny import MODELS, write_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError
from llava_serve.llava import Llava
from llava_serve.llm import as_message
from llava_serve.processor import Processor
from llava_serve.types import IMAGE_TOKEN_ID, PreparedPrompt

Talk = list[dict[str, Any]]

TOLERANCE = 2e-3
SIZES = [(42, 42), (30, 30), (11, 23), (41, 17), (120, 80), (97, 140), (200, 40), (33, 310), (300, 300), (1, 1)]
"""(width, height): up to one tile, where several canvases are equally good; landscape, portrait, strips, one pixel."""
QUESTIONS = ["What is shown in this image?", "  Is the circle\nleft of the square?  ", "Wie heißt das 蓝色 one? ☃"]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model once, when it is first asked for."""

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("hf") / name
        write_model(folder, MODELS[name])
        return folder

    return write


class Reference:
    """A checkpoint in transformers' own hands."""

    def __init__(self, folder: Path, anyres: bool) -> None:
        images, processor, model = (
            (LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaNextForConditionalGeneration)
            if anyres
            else (LlavaImageProcessorPil, LlavaProcessor, LlavaForConditionalGeneration)
        )
        self.processor = processor.from_pretrained(
            folder, image_processor=images.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder)
        )
        assert type(self.processor.image_processor) is images
        self.model, notes = model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not notes["missing_keys"]
        assert not notes["unexpected_keys"]
        self.model.eval()

    def inputs(self, talk: Talk) -> Any:
        return self.processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def tiles_per_image(self, talk: Talk) -> list[int]:
        """transformers pads the tiles of several pictures to one number."""
        pictures = [part["image"] for message in talk for part in message["content"] if part["type"] == "image"]
        return [len(self.processor.image_processor(one)["pixel_values"][0]) for one in pictures]


@pytest.fixture(scope="session")
def reference_of(folder_of: Callable[[str], Path]) -> Callable[[str], Reference]:
    return cache(lambda name: Reference(folder_of(name), MODELS[name].anyres))


@pytest.fixture(scope="session")
def processor_of(folder_of: Callable[[str], Path]) -> Callable[[str], Processor]:
    return cache(lambda name: Processor(open_checkpoint(str(folder_of(name))), ImageOptions()))


def picture(width: int, height: int) -> Image.Image:
    """Colours that differ from place to place, so that a shifted or transposed tile shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    noise = np.random.default_rng(width * 1000 + height).random((height, width))
    return Image.fromarray((np.stack([x, y**2, noise], -1) * 255).astype(np.uint8))


def said(role: str, text: str, *images: Image.Image) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


TALKS: dict[str, Talk] = {
    f"{width}x{height}": [said("user", QUESTIONS[i % len(QUESTIONS)], picture(width, height))]
    for i, (width, height) in enumerate(SIZES)
}
TALKS |= {
    "text-only": [said("user", "How many of them are there?")],
    "three-images": [said("user", "Which one is larger?", picture(120, 80), picture(30, 44), picture(20, 20))],
    "two-turns": [
        said("user", "What is it?", picture(90, 150)),
        said("assistant", "A red one."),
        said("user", "And this?", picture(64, 20)),
    ],
    "a-system-message": [said("system", "Be brief."), said("user", "What is it?", picture(50, 70))],
}


def prepare(processor: Processor, talk: Talk) -> PreparedPrompt:
    return processor.prepare([as_message(message, processor.options) for message in talk])


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_pixels(name: str, talk: str, reference_of: Any, processor_of: Any) -> None:
    reference, processor = reference_of(name), processor_of(name)
    prepared = prepare(processor, TALKS[talk])
    inputs = reference.inputs(TALKS[talk])
    ids = np.where(prepared.token_ids == IMAGE_TOKEN_ID, reference.model.config.image_token_id, prepared.token_ids)
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    assert prepared.prompt == reference.processor.apply_chat_template(TALKS[talk], add_generation_prompt=True)
    if "pixel_values" not in inputs:
        assert not prepared.tiles
        return
    image = processor.spec.image
    counts = reference.tiles_per_image(TALKS[talk]) if MODELS[name].anyres else [None] * len(prepared.tiles)
    for tiles, expected, count in zip(prepared.tiles, inputs["pixel_values"], counts, strict=True):
        pixels = (tiles / 255 - np.array(image.mean)) / np.array(image.std)
        expected = expected[:count] if MODELS[name].anyres else expected[None]
        assert pixels.shape[:1] == expected.shape[:1]
        np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, folder_of: Any, reference_of: Any, processor_of: Any) -> None:
    model = Llava.load(processor_of(name).spec)
    for talk in TALKS.values():
        prepared = prepare(processor_of(name), talk)
        with torch.inference_mode():
            expected = reference_of(name).model(**reference_of(name).inputs(talk)).logits
            got = model.language_model(inputs_embeds=embeddings(model, prepared)[None]).logits
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def embeddings(model: Llava, prepared: PreparedPrompt) -> torch.Tensor:
    """[positions, hidden] of a prompt with its pictures merged in."""
    merged = model.embed(torch.from_numpy(prepared.token_ids.astype(np.int64)).clamp(min=0)).clone()
    pictures = zip(prepared.image_spans, prepared.tiles, prepared.image_sizes, strict=True)
    for (start, end), tiles, size in pictures:
        merged[start:end] = model.image_embeddings(model.tower_features(torch.from_numpy(tiles)), size)
    return merged


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str, folder_of: Any, reference_of: Any) -> None:
    talks = [TALKS[key] for key in ("30x30", "97x140", "text-only", "three-images", "two-turns")]
    llm = LLM(str(folder_of(name)), device="cpu", dtype="float32")
    results = llm.chat(talks, SamplingParams(temperature=0, max_new_tokens=10))
    reference = reference_of(name)
    for talk, result in zip(talks, results, strict=True):
        inputs = reference.inputs(talk)
        generated = reference.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        expected = generated[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(result.token_ids) == expected
        assert result.text == reference.processor.decode(expected, skip_special_tokens=True).strip()


def test_a_query_is_a_chat_of_one_message(folder_of: Any) -> None:
    llm = LLM(str(folder_of("llava-next-mistral-hub")), device="cpu", dtype="float32")
    image = picture(70, 40)
    query = llm.processor.prepare_query("What is it?", [image])
    chat = prepare(llm.processor, [said("user", "What is it?", image)])
    assert query.prompt == chat.prompt == "<s>[INST] <image>\nWhat is it? [/INST]"
    assert query.token_ids.tolist() == chat.token_ids.tolist()


def test_what_a_user_types_is_no_control_token(processor_of: Any) -> None:
    processor = processor_of("llava-1.5-llama-hub")
    prepared = prepare(processor, [said("user", "<image></s><s> one", picture(30, 30))])
    assert len(prepared.image_spans) == 1
    controls = {processor.tokenizer.token_id(token) for token in ("<image>", "</s>")}
    assert not controls & set(prepared.token_ids.tolist())
    assert prepared.token_ids.tolist().count(processor.tokenizer.token_id("<s>")) == 1


def test_tokenizer_json_decides_on_the_opening_token(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-1.5-llama-hub"), tmp_path)
    change_json(folder / "tokenizer_config.json", add_bos_token=False)
    reference = Reference(folder, anyres=False)
    talk = TALKS["text-only"]
    prepared = prepare(Processor(open_checkpoint(str(folder)), ImageOptions()), talk)
    assert prepared.token_ids.tolist() == reference.inputs(talk)["input_ids"][0].tolist()
    assert prepared.token_ids[0] == 1


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


def change_json(path: Path, *inside: str, **changes: Any) -> None:
    """Sets keys of a JSON file, in an object inside it where one is named; None removes a key."""
    whole = json.loads(path.read_text())
    part = whole
    for key in inside:
        part = part[key]
    part |= changes
    for key in [key for key, value in part.items() if value is None]:
        del part[key]
    path.write_text(json.dumps(whole))


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "OneVision": ((), {"model_type": "llava_onevision"}, "LLaVA-OneVision"),
    "video": ((), {"model_type": "llava_next_video"}, "LLaVA-NeXT-Video"),
    "VipLLaVA": ((), {"model_type": "vipllava"}, "VipLLaVA"),
    "another model": ((), {"model_type": "qwen2_vl"}, "'qwen2_vl'"),
    "Qwen2": (("text_config",), {"model_type": "qwen2"}, "qwen2"),
    "Llama-3 by its vocabulary": (("text_config",), {"vocab_size": 128320}, "Llama-3"),
    "Llama-3.1": (("text_config",), {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "Llama-3"),
    "dynamic positions": (("text_config",), {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "SigLIP": (("vision_config",), {"model_type": "siglip_vision_model"}, "'siglip_vision_model'"),
    "several layers": ((), {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
    "another tokenizer": ((), {"image_token_index": 7}, "image_token_index"),
    "quantized": ((), {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
    "no such value": (("vision_config",), {"patch_size": "many"}, "config.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, folder_of: Any, tmp_path: Path) -> None:
    inside, changes, named = REFUSED[what]
    folder = copy(folder_of("llava-1.5-llama-hub"), tmp_path)
    change_json(folder / "config.json", *inside, **changes)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["llava-next-llama", "llava-1.5-llama-hub"])
def test_refused_with_tensors_missing_and_surplus(name: str, folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of(name), tmp_path)
    file = min(folder.glob("*.safetensors"))
    weights = load_file(file)
    gone = next(name for name in weights if "language_model.model.layers.1" in name)
    del weights[gone]
    save_file(weights | {"multi_modal_projector.linear_3.bias": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        Llava.load(open_checkpoint(str(folder)))
    for part in (gone, f"multi_modal_projector.linear_3.bias (in {file.name})", "Download it again"):
        assert part in refused.value.message


def test_refused_with_the_class_token_in_a_grid(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-next-llama"), tmp_path)
    change_json(folder / "config.json", vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy"):
        open_checkpoint(str(folder))


def test_refused_where_canvases_differ(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-next-llama-hub"), tmp_path)
    change_json(folder / "config.json", image_grid_pinpoints=[[42, 84]])
    with pytest.raises(CheckpointError, match="image_grid_pinpoints"):
        open_checkpoint(str(folder))


def test_refused_with_other_rows_than_the_config_says(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-1.5-llama-hub"), tmp_path)
    change_json(folder / "config.json", "text_config", vocab_size=512)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight in .*448.*512"):
        Llava.load(open_checkpoint(str(folder)))
