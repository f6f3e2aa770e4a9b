"""Which template a checkpoint gets: by the words of its name, and by its files."""

from __future__ import annotations

import pytest

from llava_serve.prompts.templates import Content, choose_template, note_on_guess


@pytest.mark.parametrize(
    ("name", "decoder", "expected"),
    [
        ("llava-llama-2-13b-chat-lightning-preview", "llama", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral", "mistral_instruct"),
        ("llava-v1.6-34b", "llama", "chatml_direct"),
        ("llava-v1.5-13b", "llama", "llava_v1"),
        ("LLaVA-Lightning-MPT-7B-preview", "mpt", "mpt"),
        ("LLaVA-13b-delta-v0", "llama", "llava_v0"),
        ("llava-1.5-7b", "llama", "llava_v1"),
        ("my-finetune", "mistral", "mistral_instruct"),
        ("my-finetune", "mpt", "mpt"),
    ],
)
def test_the_name_decides_and_otherwise_the_content(name: str, decoder: str, expected: str) -> None:
    mlp = "v0" not in name  # the first release has a linear projector
    choice = choose_template(name, Content(decoder, mlp=mlp, has_chatml="34b" in name))
    assert (choice.key, choice.contradiction) == (expected, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attempt-3", "llama"),
        ("llava-1.5-prompt-tuned", "llama"),
        ("acme-vqa-v0.3", "llama"),
        ("rev03-final", "llama"),
        ("my-llama-2b-vqa", "llama"),
        ("llama3-llava", "llama"),
        ("exempt", "mistral"),
        ("dev1", "mistral"),
        ("mistralize", "llama"),
        ("empty-run", "mpt"),
    ],
)
def test_only_whole_words_of_a_name_count(name: str, content: str) -> None:
    choice = choose_template(name, Content(content))
    assert choice.key == {"llama": "llava_v1", "mistral": "mistral_instruct", "mpt": "mpt"}[content]
    assert "the name does not decide" in choice.reason
    assert choice.contradiction is None


@pytest.mark.parametrize(
    ("name", "content", "expected", "by_name"),
    [
        ("exp-mistral-init-vicuna", Content("llama"), "llava_v1", "mistral_instruct"),
        ("acme-v1", Content("mistral"), "mistral_instruct", "llava_v1"),
        ("llava-v0-run", Content("mistral"), "mistral_instruct", "llava_v0"),
        ("llava-v0-run", Content("llama"), "llava_v1", "llava_v0"),
        ("v1-mm", Content("mpt", has_chatml=True), "mpt", "llava_v1"),
        ("mpt-like", Content("llama"), "llava_v1", "mpt"),
        ("llava-v1.6-yi-34b", Content("llama", has_chatml=True), "chatml_direct", "llava_v1"),
        ("hermes-mistral", Content("mistral", has_chatml=True), "chatml_direct", "mistral_instruct"),
        ("llama-2-like", Content("mistral"), "mistral_instruct", "llava_llama_2"),
        ("v1.6-34b", Content("llama"), "llava_v1", "chatml_direct"),
    ],
)
def test_the_content_decides_against_the_name(name: str, content: Content, expected: str, by_name: str) -> None:
    choice = choose_template(name, content)
    assert choice.key == expected
    assert choice.contradiction is not None
    assert f"--conv-mode {by_name} takes the name's" in choice.contradiction
    assert "though the name contains" in choice.reason


def test_content_of_other_kinds() -> None:
    assert choose_template("ckpt", Content("llama", has_chatml=True)).key == "chatml_direct"
    assert choose_template("ckpt", Content("llama", mlp=False, start_end=True)).key == "llava_v0"
    llama_2 = Content("llama", mlp=False, start_end=True, tokenizer_template="[INST] <<SYS>>")
    assert choose_template("ckpt", llama_2).key == "llava_llama_2"
    assert choose_template("ckpt", Content("qwen2", has_chatml=True)).key == "qwen_1_5"
    assert choose_template("ckpt", Content("llama", has_headers=True)).key == "llava_llama_3"


def test_a_name_that_says_what_the_content_says_is_no_contradiction() -> None:
    assert choose_template("llava-v1.5-gemma", Content("gemma")) == ("llava_v1", "the name contains 'v1'", None)


@pytest.mark.parametrize("decoder", ["gemma", "granite", "mixtral"])
def test_without_any_template_the_guess_is_reported(decoder: str) -> None:
    content = Content(decoder)
    note = note_on_guess(choose_template("ckpt", content), content)
    assert note is not None
    assert f"a guess: there is no chat template, and none is known for {decoder}" in note
    for known in ("llama", "mistral", "mpt", "qwen2", "qwen3"):
        content = Content(known)
        assert note_on_guess(choose_template("ckpt", content), content) is None
