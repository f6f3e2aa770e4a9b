"""Small tokenizers with the vocabulary sizes and the special tokens of large ones, so that ids are the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = (
    "What is shown in this image? The picture shows a red circle left of a blue square.",
    "Describe the picture in one sentence. How many of them are there?",
    "You are a helpful assistant. system user assistant",
    "A chat between a curious human and an artificial intelligence assistant.",
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern that GPT-4's, Llama 3's and Qwen's tokenizers cut words by (Qwen's takes digits one by one)."""

Special = Mapping[int, str | AddedToken]


def qwen(*extra: str) -> PreTrainedTokenizerFast:
    """Qwen's, with more special tokens behind its own."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra)
    special = {151643 + i: name for i, name in enumerate(names)}
    tokenizer = byte_level(151643, special, words=_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"))
    tokenizer.normalizer = normalizers.NFC()
    return _fast(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


PHI_3: dict[int, str | AddedToken] = {
    32000: "<|endoftext|>",
    32001: "<|assistant|>",
    32006: "<|system|>",
    32007: "<|end|>",
    32010: "<|user|>",
}
LLAMA_3 = {
    128000: "<|begin_of_text|>",
    128001: "<|end_of_text|>",
    128006: "<|start_header_id|>",
    128007: "<|end_header_id|>",
    128009: "<|eot_id|>",
}
LLAMA_3_1 = LLAMA_3 | {128004: "<|finetune_right_pad_id|>", 128008: "<|eom_id|>", 128010: "<|python_tag|>"}


def llama_3(
    *extra: str, named: Mapping[int, str] = LLAMA_3, pad_token: str = "<|end_of_text|>"
) -> PreTrainedTokenizerFast:
    """Llama 3's, its reserved tokens numbered as in the release whose named ones are given."""
    free = (i for i in range(128000, 128256) if i not in named)
    special = dict(named) | {i: f"<|reserved_special_token_{n}|>" for n, i in enumerate(free)}
    special |= {128256 + i: name for i, name in enumerate(extra)}
    tokenizer = byte_level(128000, special)
    _open_with(tokenizer, "<|begin_of_text|>", processors.ByteLevel(trim_offsets=True, add_prefix_space=False))
    return _fast(tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token=pad_token)


def llama(
    size: int = 32000,
    special: Special | None = None,
    *,
    names: Sequence[str] = ("<unk>", "<s>", "</s>"),
    controls: Mapping[int, str] | None = None,
    space: str = "normalizer",
    bos: str = "<s>",
    **roles: str,
) -> PreTrainedTokenizerFast:
    """A sentencepiece-like one: BPE over `▁` with bytes for what it lacks.

    Args:
        size: of the vocabulary, filled up with tokens that no text has.
        special: tokens behind it, by id.
        names: of the first tokens.
        controls: special tokens inside the vocabulary, by id.
        space: before a text: `normalizer` at every one between special tokens, `first` at the beginning, else none.
        bos: opens a prompt.
        roles: such as `eos_token`; Llama's by default.
    """
    pieces = _trained(pre_tokenizers.Metaspace(), 180)
    all_names = [*names, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces["names"]]
    all_names += [f"<filler{i}>" for i in range(len(all_names), size)]
    for i, name in (controls or {}).items():
        all_names[i] = name
    vocabulary = {name: i for i, name in enumerate(all_names)}
    bpe = models.BPE(vocab=vocabulary, merges=pieces["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepended = [normalizers.Prepend("▁")] if space == "normalizer" else []
        tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    stripped = [decoders.Strip(" ", 1, 0)] if space in ("normalizer", "first") else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([_special(name) for name in (*names, *(controls or {}).values())])
    _append(tokenizer, special or {}, size)
    _open_with(tokenizer, bos)
    llama_roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return _fast(tokenizer, **(roles or llama_roles))


def byte_level(size: int, special: Special, *, words: str = _WORDS, first: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE, filled up to `size` tokens; special ones behind them by id, and the `first` ones in front."""
    pieces = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), 400, pre_tokenizers.ByteLevel.alphabet())
    names = [*first, *pieces["names"]]
    names += [f"<filler{i}>" for i in range(len(names), size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pieces["merges"]))
    cut = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(name) for name in first])
    _append(tokenizer, special, size)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, add_prefix_space=False, use_regex=False)
    return tokenizer


def _trained(pre_tokenizer: Any, size: int, alphabet: Sequence[str] = ()) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=list(alphabet))
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "names": sorted(model["vocab"], key=model["vocab"].get),
        "merges": [tuple(merge) for merge in model["merges"]],
    }


def _append(tokenizer: Tokenizer, special: Special, size: int) -> None:
    """Adds tokens so that each gets its id; what lies between is filled up."""
    if special:
        filled = [special.get(i, f"<|dummy_{i}|>") for i in range(size, max(special) + 1)]
        tokenizer.add_special_tokens([one if isinstance(one, AddedToken) else _special(one) for one in filled])


def _special(name: str) -> AddedToken:
    return AddedToken(name, normalized=False, special=True)


def _open_with(tokenizer: Tokenizer, bos: str, *before: Any) -> None:
    opening = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([*before, opening]) if before else opening


def _fast(tokenizer: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)
