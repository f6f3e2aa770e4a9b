"""The language models that are supported, and the checks of their configs: the same for both layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llava_serve.errors import CheckpointError


class Defaults(NamedTuple):
    """Of a language model's config class in transformers: files leave out what equals them."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    tied: bool = False


DECODERS = {
    "apertus": Defaults(131_072, 65_536, (2,)),
    "arcee": Defaults(32_000, 4_096, (128001,)),
    "bitnet": Defaults(128_256, 2_048, (128001,)),
    "cohere": Defaults(256_000, 8_192, (255001,), tied=True),
    "cohere2": Defaults(256_000, 8_192, (255001,), tied=True),
    "exaone4": Defaults(102_400, 2_048, (2,)),
    "gemma": Defaults(256_000, 8_192, (1,), tied=True),
    "gemma3_text": Defaults(262_208, 131_072, (1,), tied=True),
    "glm": Defaults(151_552, 131_072, (151329, 151336, 151338)),
    "glm4": Defaults(151_552, 131_072, (151329, 151336, 151338)),
    "granite": Defaults(32_000, 2_048, (2,)),
    "helium": Defaults(48_000, 4_096, (2,)),
    "llama": Defaults(32_000, 2_048, (2,)),
    "ministral": Defaults(32_000, 131_072, (2,)),
    "ministral3": Defaults(131_072, 262_144, (2,)),
    "mistral": Defaults(32_000, 131_072, (2,)),
    "mixtral": Defaults(32_000, 131_072, (2,)),
    "mpt": Defaults(50_368, 2_048, (), tied=True),
    "olmo2": Defaults(50_304, 2_048, (50279,)),
    "olmo3": Defaults(50_304, 2_048, (50279,)),
    "phi": Defaults(51_200, 2_048, (2,)),
    "phi3": Defaults(32_064, 4_096, (32000,)),
    "qwen2": Defaults(151_936, 32_768, ()),
    "qwen2_moe": Defaults(151_936, 32_768, ()),
    "qwen3": Defaults(151_936, 32_768, ()),
    "qwen3_moe": Defaults(151_936, 32_768, ()),
    "seed_oss": Defaults(155_136, 524_288, (2,)),
    "smollm3": Defaults(128_256, 32_768, (128001,), tied=True),
    "starcoder2": Defaults(49_152, 4_096, (50256,), tied=True),
}
"""`model_type` of the language models whose steps the tests compare with transformers' own forward pass. Another one
may differ without an error: its attention is bounded or has sinks, or there are states beside the keys and values."""

DECODER_NOTES = {
    "gemma": "Gemma scales the embeddings of tokens and not the features of images, as transformers has it since 5.4. "
    "Before, it scaled both: a model that was trained so sees images weakly."
}
"""What is to be known of a language model, by its `model_type`."""

ROTARY_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""How rotary positions may be scaled. The tables of `dynamic` and `longrope` depend on the longest sequence of a step,
which holds those of other requests."""

UNUSED_KEYS = frozenset(
    (
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "pad_token_id"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    )
)
"""Of the config of a language model or a tower: what is decided here, or belongs to training."""


def refuse_unsupported_text(text: dict[str, Any], where: str) -> None:
    """Refuses language models that are not tested here: a wrong answer would look like a right one.

    Args:
        text: its config, with `model_type`.
        where: whose language model it is, for the message.

    Raises:
        CheckpointError: names the model, and those that are supported.
    """
    kind = text["model_type"]
    if kind not in DECODERS:
        raise CheckpointError(
            f"config.json: the language model of this {where} is {kind}, which is not supported; these are: "
            f"{', '.join(sorted(DECODERS))}."
        )
    if text.get("sliding_window") == 0 and kind != "qwen2_moe":  # whose config class writes 0 where there is none
        raise CheckpointError(
            "config.json has sliding_window 0, with which no position sees another; compare it with the published one."
        )
    for rotary in rotary_types(text):
        if rotary is None:
            raise CheckpointError(
                "config.json scales rotary positions (rope_scaling) without a type; compare it with the published one."
            )
        if rotary not in ROTARY_TYPES:
            raise CheckpointError(
                f"config.json: the language model of this {where} is a {kind} with {rotary!r} rotary positions, which "
                f"are not supported; {', '.join(sorted(ROTARY_TYPES))} are."
            )


def rotary_types(text: dict[str, Any]) -> Iterator[str | None]:
    """How rotary positions are scaled: `rope_parameters` since transformers 5, in some models by the kind of layer, and
    `rope_scaling` before, which transformers prefers where a file has both. None is a factor without a type."""
    settings = text.get("rope_scaling") or text.get("rope_parameters") or {}
    by_kind = [one for one in settings.values() if isinstance(one, dict)]
    for one in by_kind or [settings]:
        kind = one.get("rope_type") or one.get("type")
        lacks_one = kind is None and bool(one.keys() & {"rope_type", "type", "factor"})
        yield None if lacks_one else str(kind or "default")
