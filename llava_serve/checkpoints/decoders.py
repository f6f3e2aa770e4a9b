"""The language models that are supported, and the checks of their configs: the same for both layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_serve.errors import CheckpointError

DECODERS = frozenset(
    {
        *("apertus", "arcee", "bitnet", "cohere", "cohere2", "exaone4", "gemma", "gemma3_text", "glm", "glm4"),
        *("granite", "helium", "llama", "ministral", "ministral3", "mistral", "mixtral", "mpt", "olmo2", "olmo3"),
        *("phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
    }
)
"""`model_type` of the language models whose steps the tests compare with transformers' own forward pass. Another one
may differ without an error: its attention is bounded or has sinks, or there are states beside the keys and values."""

ROTARY_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""How rotary positions may be scaled. The tables of `dynamic` and `longrope` depend on the longest sequence of a step,
which holds those of other requests."""


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
    for rotary in rotary_types(text):
        if rotary not in ROTARY_TYPES:
            raise CheckpointError(
                f"config.json: the language model of this {where} is a {kind} with {rotary!r} rotary positions, which "
                f"are not supported; {', '.join(sorted(ROTARY_TYPES))} are."
            )


def rotary_types(text: dict[str, Any]) -> Iterator[str]:
    """How rotary positions are scaled: `rope_parameters` since transformers 5, in some models by the kind of layer, and
    `rope_scaling` before."""
    settings = text.get("rope_parameters") or text.get("rope_scaling") or {}
    by_kind = [one for one in settings.values() if isinstance(one, dict)]
    for one in by_kind or [settings]:
        yield str(one.get("rope_type") or one.get("type") or "default")
