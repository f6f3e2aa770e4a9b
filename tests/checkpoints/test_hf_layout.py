"""Checkpoints in transformers' layout answer as transformers' own classes do, with its PIL image processors."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from llava_serve.types import PreparedPrompt
from support.hf_reference import TOLERANCE, Reference, Talk, said
from support.hub_spelling import write_json
from support.scenes import picture
from support.tiny_hf import FAMILY, MODELS
from support.variants import edit

KINDS = MODELS | FAMILY
SOME = ("30x30", "120x80", "200x40", "three-images", "two-turns")
"""The conversations for the newer kinds, whose language models other tests compare."""

ONE_THREAD = EngineOptions(num_threads=1)  # tiny models gain nothing from more, and wait for each other
SIZES = [(42, 42), (30, 30), (11, 23), (41, 17), (120, 80), (97, 140), (200, 40), (33, 310), (1, 1), (392, 147)]
SIZES += [(132, 40)]
"""(width, height): up to one tile, where several canvases are equally good; landscape, portrait, strips, one pixel; a
quotient that is cut off before it is rounded; and a grid that is not enough too large to be shrunk."""
QUESTIONS = ["What is shown in this image?", "  Is the circle\nleft of the square?  ", "Wie heißt das 蓝色 one? ☃"]


@pytest.fixture(scope="session")
def reference_of(folder_of: Callable[[str], Path]) -> Callable[[str], Reference]:
    return cache(lambda name: Reference(folder_of(name), KINDS[name]))


@pytest.fixture(scope="session")
def processor_of(folder_of: Callable[[str], Path]) -> Callable[[str], Processor]:
    return cache(lambda name: Processor(open_checkpoint(str(folder_of(name))), ImageOptions()))


def transparent(image: Image.Image) -> Image.Image:
    image.putalpha(image.convert("L"))
    return image


def as_file(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "PNG")
    return Image.open(data)


TALKS: dict[str, Talk] = {
    f"{width}x{height}": [said("user", QUESTIONS[i % len(QUESTIONS)], picture(width, height))]
    for i, (width, height) in enumerate(SIZES)
}
TALKS |= {
    "transparent": [said("user", "What is it?", transparent(picture(60, 90)))],
    "transparent-palette": [said("user", "What is it?", as_file(transparent(picture(50, 30)).quantize(8)))],
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
    return processor.prepare(processor.read(talk))


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", KINDS)
def test_ids_and_pixels(name: str, talk: str, reference_of: Any, processor_of: Any) -> None:
    reference, processor = reference_of(name), processor_of(name)
    prepared = prepare(processor, TALKS[talk])
    inputs = reference.inputs(TALKS[talk])
    reference.assert_same_ids(TALKS[talk], prepared)
    rendered = reference.processor.apply_chat_template(TALKS[talk], add_generation_prompt=True)
    assert prepared.prompt == rendered.replace(KINDS[name].image_token, "<image>")
    if "pixel_values" not in inputs:
        assert not prepared.tiles
        return
    image = processor.spec.image
    counts = reference.tiles_per_image(TALKS[talk]) if KINDS[name].anyres else [None] * len(prepared.tiles)
    for tiles, expected, count in zip(prepared.tiles, inputs["pixel_values"], counts, strict=True):
        pixels = (tiles / 255 - np.array(image.mean)) / np.array(image.std)
        expected = expected[:count] if KINDS[name].anyres else expected[None]
        assert pixels.shape[:1] == expected.shape[:1]
        np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), expected, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_logits(name: str, folder_of: Any, reference_of: Any, processor_of: Any) -> None:
    model = Llava.load(processor_of(name).spec)
    for key in TALKS if name in MODELS else SOME:
        talk = TALKS[key]
        reference_of(name).assert_same_logits(talk, prepare(processor_of(name), talk), model)


@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens(name: str, folder_of: Any, reference_of: Any) -> None:
    talks = [TALKS[key] for key in ("30x30", "97x140", "text-only", "three-images", "two-turns")]
    llm = LLM(str(folder_of(name)), device="cpu", dtype="float32", engine=ONE_THREAD)
    results = llm.chat(talks, SamplingParams(temperature=0, max_new_tokens=10))
    reference = reference_of(name)
    for talk, result in zip(talks, results, strict=True):
        inputs = reference.inputs(talk)
        generated = reference.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        expected = generated[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(result.token_ids) == expected
        assert result.text == reference.processor.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["llava-1.5-llama-hub", "llava-next-mistral-hub"])
@pytest.mark.parametrize("key", ["97x140", "two-turns"])
def test_scores_of_a_prompt_with_pictures(name: str, key: str, folder_of: Any, reference_of: Any) -> None:
    llm = LLM(str(folder_of(name)), device="cpu", dtype="float32", engine=ONE_THREAD)
    result = llm.chat(TALKS[key], SamplingParams(prompt_logprobs=1, max_new_tokens=0))
    inputs = reference_of(name).inputs(TALKS[key])
    with torch.inference_mode():
        table = reference_of(name).model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    pictures = [at for at, token in enumerate(ids) if token == reference_of(name).model.config.image_token_id]
    assert pictures
    assert result.prompt_logprobs is not None
    assert [at for at, entry in enumerate(result.prompt_logprobs) if entry is None] == [0, *pictures]
    for before, token, entry in zip(table[:-1], ids[1:], result.prompt_logprobs[1:], strict=True):
        if entry is not None:
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(before[token]), abs=TOLERANCE)
            assert entry.top[0][2] == pytest.approx(float(before.max()), abs=TOLERANCE)


def test_a_query_is_a_chat_of_one_message(folder_of: Any) -> None:
    llm = LLM(str(folder_of("llava-next-mistral-hub")), device="cpu", dtype="float32", engine=ONE_THREAD)
    image = picture(70, 40)
    query = llm.processor.prepare_query("What is it?", [image])
    chat = prepare(llm.processor, [said("user", "What is it?", image)])
    assert query.prompt == chat.prompt == "<s>[INST] <image>\nWhat is it? [/INST]"
    assert query.token_ids.tolist() == chat.token_ids.tolist()


def test_without_a_chat_template_the_guess_is_a_note(folder_of: Any, tmp_path: Path) -> None:
    for name, guessed in (("llava-gemma", True), ("llava-1.5-llama", False)):
        folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
        (folder / "chat_template.jinja").unlink()
        guesses = [note for note in open_checkpoint(str(folder)).notes if "is a guess" in note]
        assert len(guesses) == guessed
        assert "--conv-mode" not in " ".join(open_checkpoint(str(folder), conv_mode="llava_v0").notes)


def test_what_a_user_types_is_no_control_token(processor_of: Any) -> None:
    processor = processor_of("llava-1.5-llama-hub")
    prepared = prepare(processor, [said("user", "<image></s><s> one", picture(30, 30))])
    assert len(prepared.image_spans) == 1
    controls = {processor.tokenizer.token_id(token) for token in ("<image>", "</s>")}
    assert not controls & set(prepared.token_ids.tolist())
    assert prepared.token_ids.tolist().count(processor.tokenizer.token_id("<s>")) == 1


def test_the_tokenizer_names_the_image_token(folder_of: Any, tmp_path: Path) -> None:
    name = "llava-1.5-named-image-token-hub"
    folder = Path(shutil.copytree(folder_of(name), tmp_path / "llava"))
    edit(folder / "processor_config.json", image_token="<pad>")
    edit(folder / "tokenizer_config.json", image_token=None, extra_special_tokens={"image_token": "<img>"})
    prepared = prepare(Processor(open_checkpoint(str(folder)), ImageOptions()), TALKS["30x30"])
    Reference(folder, MODELS[name]).assert_same_ids(TALKS["30x30"], prepared)


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_a_tokenizer_that_cut_or_filled_up_texts_in_training(setting: str, processor_of: Any, tmp_path: Path) -> None:
    name = "llava-1.5-llama-hub"
    folder = Path(shutil.copytree(processor_of(name).spec.path, tmp_path / "llava"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if setting == "truncation":
        tokenizer.enable_truncation(6)
    else:
        tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = Processor(open_checkpoint(str(folder)), ImageOptions())
    for key in ("text-only", "two-turns"):
        whole = prepare(processor_of(name), TALKS[key]).token_ids
        assert prepare(processor, TALKS[key]).token_ids.tolist() == whole.tolist()


def test_tokenizer_json_decides_on_the_opening_token(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("llava-1.5-llama-hub"), tmp_path / "llava"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"add_bos_token": False})
    reference = Reference(folder, MODELS["llava-1.5-llama-hub"])
    talk = TALKS["text-only"]
    prepared = prepare(Processor(open_checkpoint(str(folder)), ImageOptions()), talk)
    assert prepared.token_ids.tolist() == reference.inputs(talk)["input_ids"][0].tolist()
    assert prepared.token_ids[0] == 1
