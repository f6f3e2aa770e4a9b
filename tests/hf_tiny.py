"""Tiny random models in transformers' layout, as its own classes save them and as the hub's files hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

TILE, PATCH = 42, 14
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
"""(height, width): the hub's, with tiles of 42 pixels instead of 336."""

USER_ASSISTANT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'][0]['text'] %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant.') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ system + '\\n' }}{% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}{% else %}"
    "{% for content in message['content'] %}{{ ' ' + content['text'] + eos_token }}{% endfor %}{% endif %}{% endfor %}"
)

_CORPUS = (
    "USER: What is shown in this image? ASSISTANT: A red circle stands left of a blue square on a white ground.",
    "[INST] How many of them are there, and which one is larger than the others? [/INST] Three; the green one.",
    "A chat between a curious human and an artificial intelligence assistant.\nThe assistant gives polite answers.",
    "Describe the picture in one sentence, then name the colours that you can see in it: yellow, black, grey.",
)


@dataclass(frozen=True)
class Tiny:
    """One model of the family.

    Attributes:
        anyres: LLaVA-NeXT, else LLaVA-1.5.
        text: settings of the language model's config beside the common ones.
        strategy: `vision_feature_select_strategy`.
        prepended: the tokenizer's normalizer puts a space before every text between special tokens, as in the older
            hub files, else a pre-tokenizer does so at the beginning only.
        image: settings of the image processor beside the common ones.
        files: as `save_pretrained` writes them, as the hub's repositories hold them, or with the names of the modules
            in memory (`save_original_format=False`).
    """

    anyres: bool
    decoder: str
    files: Literal["saved", "hub", "modules"] = "saved"
    text: dict[str, Any] = field(default_factory=dict)
    strategy: str = "default"
    prepended: bool = False
    template: str = USER_ASSISTANT
    image: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "llava-1.5-llama": Tiny(False, "llama"),
    "llava-1.5-llama-hub": Tiny(False, "llama", "hub", prepended=True),
    "llava-1.5-llama-modules": Tiny(False, "llama", "modules"),
    "llava-1.5-padding": Tiny(False, "llama", image={"do_pad": True}),
    "llava-1.5-full-tied": Tiny(False, "llama", text={"tie_word_embeddings": True}, strategy="full"),
    "llava-1.5-full-tied-hub": Tiny(False, "llama", "hub", text={"tie_word_embeddings": True}, strategy="full"),
    "llava-1.5-sliding-mistral-hub": Tiny(False, "mistral", "hub", text={"sliding_window": 11}),
    "llava-1.5-long-llama": Tiny(
        False, "llama", text={"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    ),
    "llava-next-llama": Tiny(True, "llama"),
    "llava-next-llama-hub": Tiny(True, "llama", "hub", text={"eos_token_id": 7}),
    "llava-next-llama-tied": Tiny(True, "llama", text={"tie_word_embeddings": True}),
    "llava-next-mistral": Tiny(True, "mistral", template=INSTRUCT, text={"sliding_window": None}),
    "llava-next-mistral-hub": Tiny(
        True, "mistral", "hub", template=INSTRUCT, prepended=True, text={"sliding_window": None, "rope_theta": 1e6}
    ),
}


def write_model(folder: Path, tiny: Tiny) -> None:
    """Writes a folder that transformers and this project can both open."""
    tokenizer = _tokenizer(tiny)
    model = _model(tiny, tokenizer)
    _processor(tiny, tokenizer).save_pretrained(folder)
    model.save_pretrained(folder, save_original_format=tiny.files != "modules")
    if tiny.files == "hub":
        rewrite_as_hub(folder, tiny)


def _model(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> Any:
    vocab_size = -(-len(tokenizer) // 64) * 64
    text_class = LlamaConfig if tiny.decoder == "llama" else MistralConfig
    text = text_class(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **tiny.text,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    classes: tuple[Any, Any] = (LlavaConfig, LlavaForConditionalGeneration)
    settings: dict[str, Any] = {}
    if tiny.anyres:
        classes = (LlavaNextConfig, LlavaNextForConditionalGeneration)
        settings = {"image_grid_pinpoints": PINPOINTS}
    torch.manual_seed(5)
    model = classes[1](
        classes[0](
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy=tiny.strategy,
            **settings,
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        elif parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.half()


def _processor(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor | LlavaNextProcessor:
    settings = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, **tiny.image}
    common = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": tiny.strategy,
        "num_additional_image_tokens": 1,
        "chat_template": tiny.template,
    }
    if tiny.anyres:
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **settings)
        return LlavaNextProcessor(image_processor=images, **common)
    return LlavaProcessor(image_processor=LlavaImageProcessorPil(**settings), **common)


def _tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast:
    """A small Llama tokenizer: BPE over `▁` with byte fallback, the image and padding tokens behind it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=180, show_progress=False))
    pieces = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(pieces["vocab"], key=pieces["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(merge) for merge in pieces["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if tiny.prepended:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def rewrite_as_hub(folder: Path, tiny: Tiny) -> None:
    """Turns what transformers 5 saved into what the hub's older repositories hold: other tensor names, two shards with
    an index, the processor's settings in files of their own, and no key that equals its default."""
    saved = load_file(folder / "model.safetensors")
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in saved.items()}
    (folder / "model.safetensors").unlink()
    middle = len(tensors) // 2
    shards = {
        f"model-0000{i + 1}-of-00002.safetensors": dict(part)
        for i, part in enumerate((list(tensors.items())[:middle], list(tensors.items())[middle:]))
    }
    for name, part in shards.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _rewrite_config(folder, tiny)
    _rewrite_processor(folder, tiny)


def _rewrite_config(folder: Path, tiny: Tiny) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config["torch_dtype"] = "float16"
    config["ignore_index"] = -100
    text, vision = config["text_config"], config["vision_config"]
    for part, defaults in (
        (text, LlamaConfig if tiny.decoder == "llama" else MistralConfig),
        (vision, CLIPVisionConfig),
    ):
        for key, value in defaults().to_dict().items():
            if key in part and part[key] == value and key != "model_type":
                del part[key]
        part.pop("dtype", None)
        part["torch_dtype"] = "float16"
    rope = text.pop("rope_parameters", {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
    text["_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    write_json(folder / "config.json", config)


def _rewrite_processor(folder: Path, tiny: Tiny) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())
    write_json(folder / "preprocessor_config.json", processor.pop("image_processor"))
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "chat_template.json", {"chat_template": tiny.template})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    config |= {"added_tokens_decoder": decoder, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    config |= {"add_bos_token": True, "add_eos_token": False, "image_token": "<image>"}
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
