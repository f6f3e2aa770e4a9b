"""Checkpoints in the original's layout whose template nobody wrote down: the tokenizer's chat template is the guess."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import CheckpointSpec, open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.processor import Processor
from llava_serve.types import IMAGE_TOKEN_ID
from support import tiny_tokenizers
from support.llama_tokenizer import llama_tokenizer
from support.scenes import picture
from support.variants import edit, read, refusal, write

CHAT = ("<|user|>", "<|assistant|>", "<|end|>")
PHI = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}{% set content = '<|start_header_id|>' + "
    "m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
Write = Callable[..., Path]


@pytest.fixture
def written(llava_15: Path) -> Write:
    """Gives the checkpoint another tokenizer, class and name."""

    def write_files(name: str, tokenizer: Any, template: str, **config: Any) -> Path:
        folder = llava_15.rename(llava_15.parent / name)
        for path in folder.glob("*token*"):
            path.unlink()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        edit(folder / "config.json", mm_use_im_patch_token=False, **config)
        return folder

    return write_files


def opened(folder: Path, **options: Any) -> CheckpointSpec:
    return open_checkpoint(str(folder), weights=False, **options)


def phi() -> Any:
    return llama_tokenizer(*CHAT, prepended=False)


@pytest.mark.parametrize(
    ("name", "tokenizer", "template", "config"),
    [
        ("llava-phi-3-mini", phi, PHI, {}),
        ("llava-phi-3-v1", phi, PHI, {}),
        ("my-phi", phi, PHI, {"architectures": ["LlavaPhi3ForCausalLM"]}),
        ("my-gemma", phi, LLAMA_2, {"architectures": ["LlavaGemmaForCausalLM"]}),
        ("llava-llama-3-8b-v1_1", tiny_tokenizers.llama_3, LLAMA_3, {}),
    ],
)
def test_the_tokenizers_template_is_the_guess(
    name: str, tokenizer: Any, template: str, config: dict[str, Any], written: Write
) -> None:
    """With the image on a line before the text, as what LLaVA's training and xtuner's put into such a template."""
    folder = written(name, tokenizer(), template, **config)
    spec = opened(folder)
    assert spec.conv_mode == "chat_template"
    assert "--conv-mode" in " ".join(spec.notes)
    prepared = Processor(spec, ImageOptions()).prepare_query("What is it?", [picture(30, 20)])
    theirs = AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "<image>\nWhat is it?"}]
    assert prepared.prompt == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    before, after = prepared.prompt.split("<image>")
    (start, end), ids = prepared.image_spans[0], prepared.token_ids.tolist()
    assert ids[:start] == theirs(before, add_special_tokens=False)["input_ids"]  # one BOS
    assert ids[start:end] == [IMAGE_TOKEN_ID] * (end - start)
    assert ids[end:] == theirs(after, add_special_tokens=False)["input_ids"]
    chosen = opened(folder, conv_mode="llava_v1")
    assert chosen.conv_mode == "llava_v1"
    assert not any("guess" in note for note in chosen.notes)


@pytest.mark.parametrize(
    ("name", "template", "config", "expected"),
    [
        ("my-llava", LLAMA_2, {}, "llava_v1"),
        ("my-mistral", PHI, {"architectures": ["LlavaMistralForCausalLM"]}, "mistral_instruct"),
        ("my-qwen", PHI, {"architectures": ["LlavaQwenForCausalLM"]}, "qwen_1_5"),
    ],
)
def test_the_originals_templates_stay(
    name: str, template: str, config: dict[str, Any], expected: str, written: Write
) -> None:
    """Of decoders that it has a template for; a chat template without tokens of its own says nothing on Llama."""
    assert opened(written(name, phi(), template, **config)).conv_mode == expected


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [("my-llava", {}, "llava_v1"), ("my-qwen", {"architectures": ["LlavaQwenForCausalLM"]}, "qwen_1_5")],
)
def test_named_templates_without_a_default_are_reported_where_the_original_has_one(
    name: str, config: dict[str, Any], expected: str, written: Write
) -> None:
    spec = opened(written(name, phi(), {"rag": LLAMA_2, "tools": LLAMA_2}, **config))
    assert (spec.conv_mode, spec.chat_template) == (expected, None)
    assert any("named rag, tools, and none is named default: none is used" in note for note in spec.notes)


@pytest.mark.parametrize(
    ("template", "config"), [(PHI, {}), (LLAMA_2, {"architectures": ["LlavaGemmaForCausalLM"]})], ids=["llama", "gemma"]
)
def test_named_templates_without_a_default_are_refused_where_one_is_needed(
    template: str, config: dict[str, Any], written: Write
) -> None:
    folder = written("mine", phi(), {"rag": template, "tools": template}, **config)
    message = refusal(folder)
    assert "named rag, tools, and none is named default" in message
    assert "--conv-mode" in message
    assert opened(folder, conv_mode="llava_v1").conv_mode == "llava_v1"


def test_llava_next_has_a_template_for_llama_3(llava_16: Path) -> None:
    tokenizer = tiny_tokenizers.llama_3()
    tokenizer.chat_template = LLAMA_3
    for path in llava_16.glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(llava_16)
    edit(llava_16 / "config.json", mm_use_im_patch_token=False)
    assert opened(llava_16).conv_mode == "llava_llama_3"


def test_a_template_that_cannot_be_called_names_the_way_out(written: Write) -> None:
    folder = written("llava-phi-3-mini", phi(), "{% for m in messages %}<|user|>{% endfor %}")
    assert "--conv-mode" in refusal(folder)
    assert opened(folder, conv_mode="plain").conv_mode == "plain"


def test_a_beginning_of_text_is_not_doubled(llava_15: Path) -> None:
    """By sentencepiece, too: a chat template writes it, and so does the tokenizer."""
    edit(llava_15 / "tokenizer_config.json", chat_template=PHI.replace("<|end|>", "<im_end>"))
    edit(llava_15 / "config.json", architectures=["LlavaGemmaForCausalLM"])
    spec = opened(llava_15)
    assert (spec.conv_mode, spec.tokenizer.kind) == ("chat_template", "sentencepiece")
    ids = Processor(spec, ImageOptions()).prepare_query("What is it?", [picture(30, 20)]).token_ids.tolist()
    assert ids[0] == 1
    assert 1 not in ids[1:]


def test_markup_in_the_vocabulary_of_sentencepiece(llava_15: Path) -> None:
    """As Gemma's: user-defined pieces, which no other file names."""
    path = llava_15 / "tokenizer.model"
    model = ModelProto.FromString(path.read_bytes())
    for piece, name in zip(model.pieces[-2:], ("<start_of_turn>", "<end_of_turn>"), strict=True):
        piece.piece, piece.type = name, ModelProto.SentencePiece.USER_DEFINED
    path.write_bytes(model.SerializeToString())
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
        "{% endfor %}<start_of_turn>model\n"
    )
    edit(llava_15 / "tokenizer_config.json", chat_template=template)
    edit(llava_15 / "config.json", architectures=["LlavaGemmaForCausalLM"])
    spec = opened(llava_15)
    assert spec.chat_template is not None
    assert {"<start_of_turn>", "<end_of_turn>"} <= {*spec.chat_template.controls}
    assert spec.chat_template.closing == "<end_of_turn>"
    ids = Processor(spec, ImageOptions()).prepare_query("Hi<end_of_turn>\n<start_of_turn>model\nYes").token_ids.tolist()
    start, end = len(model.pieces) - 2, len(model.pieces) - 1
    assert [token for token in ids if token in (start, end)] == [start, end, start]


def test_an_answer_ends_at_the_token_that_closes_a_turn(folder_of: Any, tmp_path: Path) -> None:
    """xtuner's Llama 3: generation_config.json ends an answer at a token that the chat template does not write."""
    folder = tmp_path / "llava-llama-3"
    shutil.copytree(folder_of("llava-next-mistral-0.3"), folder)
    closing = (
        "{% for m in messages %}[INST]{% for c in m['content'] %}"
        "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}[/INST]{% endfor %}"
    )
    for path in (*folder.glob("chat_template*"),):
        path.unlink()
    (folder / "chat_template.jinja").write_text(closing)
    edit(folder / "generation_config.json", eos_token_id=7)
    settings = SamplingParams(temperature=0, max_new_tokens=12)
    plain = LLM(str(folder), device="cpu", dtype="float32").generate("What is it?", sampling=settings)
    end = Processor(opened(folder), ImageOptions()).tokenizer.token_id("[/INST]")
    weights = read(folder)
    head = next(tensor for name, tensor in weights.items() if name.endswith("lm_head.weight"))
    head[end] = head[plain.token_ids[2]] * 1.5  # then it is likelier than that one
    write(folder, weights)
    llm = LLM(str(folder), device="cpu", dtype="float32")
    answer = llm.generate("What is it?", sampling=settings)
    assert (answer.token_ids[-1], answer.finish_reason) == (end, "stop")
    ignored = dataclasses.replace(settings, ignore_eos=True)
    assert len(llm.generate("What is it?", sampling=ignored).token_ids) == 12
