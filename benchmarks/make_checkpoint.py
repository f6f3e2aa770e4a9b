"""Makes checkpoints with random weights, in transformers' layout, in the sizes that the benchmarks use.

    python -m benchmarks.make_checkpoint 60m /tmp/bench/60m

`tiny` is for `--smoke`; `60m` and `60m-anyres` fit a laptop (the latter cuts a picture into five tiles, so that one
takes up to 2,928 positions), `1b` a small server, `llava-1.5-7b` has the real model's sizes.
"""

from __future__ import annotations

import argparse
import itertools
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.options import make_parser

VOCABULARY = 32_000
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}ASSISTANT:"
)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Size:
    """The sizes of a checkpoint: widths, layers and heads of the text and vision models, and the tile."""

    text: tuple[int, int, int, int]  # hidden, intermediate, layers, heads
    vision: tuple[int, int, int, int]
    image_size: int
    context: int = 4096
    anyres: bool = False


SIZES = {
    "tiny": Size((64, 128, 2, 4), (64, 128, 2, 4), 56),
    "60m": Size((512, 1376, 8, 8), (384, 1536, 6, 6), 224),
    "60m-anyres": Size((512, 1376, 8, 8), (384, 1536, 6, 6), 336, anyres=True),
    "1b": Size((2048, 5504, 22, 16), (1024, 4096, 24, 16), 336),
    "llava-1.5-7b": Size((4096, 11008, 32, 32), (1024, 4096, 24, 16), 336),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 32,000 tokens: bytes, and runs of two to four letters in alphabetical order of joining."""
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    letters = string.ascii_lowercase
    vocabulary = {token: at for at, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges: list[tuple[str, str]] = []
    shorter = list(letters)
    for _ in range(3):
        longer = []
        for first, second in itertools.product(shorter, letters):
            if len(vocabulary) == VOCABULARY:
                break
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
            longer.append(first + second)
        shorter = longer
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def make_checkpoint(size: Size, folder: Path, device: str = "cpu", *, weights: bool = True) -> None:
    """Writes config, tokenizer, processor and random bfloat16 weights; without `weights` nothing is computed."""
    torch.manual_seed(0)
    hidden, intermediate, layers, heads = size.text
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=size.context, bos_token_id=1, eos_token_id=2,
        pad_token_id=4, dtype="bfloat16",
    )  # fmt: skip
    hidden, intermediate, layers, heads = size.vision
    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=size.image_size, patch_size=14, projection_dim=hidden,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    common: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": 3, "dtype": "bfloat16"}
    edges = {"shortest_edge": size.image_size}
    crop = {"height": size.image_size, "width": size.image_size}
    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "patch_size": 14, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    with torch.device(device if weights else "meta"):
        torch.set_default_dtype(torch.bfloat16)
        model: Any
        if size.anyres:
            model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS))
            images = LlavaNextImageProcessor(size=edges, crop_size=crop, image_grid_pinpoints=PINPOINTS)
            processor: Any = LlavaNextProcessor(image_processor=images, **settings)
        else:
            model = LlavaForConditionalGeneration(LlavaConfig(**common))
            processor = LlavaProcessor(image_processor=CLIPImageProcessor(size=edges, crop_size=crop), **settings)
        torch.set_default_dtype(torch.float32)
    if weights:
        model.save_pretrained(folder)
        _rename_as_published(folder / "model.safetensors")
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _rename_as_published(file: Path) -> None:
    """Gives the tower's tensors the names of published checkpoints, which older releases of transformers wrote and vLLM
    asks for."""
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): it for name, it in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def given_or_tiny(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[str]:
    """The checkpoint of the command line. With `--smoke` there may be none: then a tiny one is made, and removed."""
    if args.model is not None:
        yield args.model
        return
    if not args.smoke:
        parser.error("a model is needed")
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(SIZES["tiny"], Path(folder))
        yield folder


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    make_checkpoint(SIZES[args.size], args.folder, args.device)


if __name__ == "__main__":
    main()
