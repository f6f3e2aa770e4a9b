"""Checks of a language model's config, the same for both layouts."""

from __future__ import annotations

from typing import Any

from llava_serve.errors import CheckpointError

_LLAMA_3_VOCABULARY = 128_000
_ROTARY = ("default", "linear")


def refuse_unsupported_text(text: dict[str, Any], where: str) -> None:
    """Refuses language models that are not tested here: a wrong answer would look like a right one.

    Args:
        text: its config, with `model_type`.
        where: whose language model it is, for the message.

    Raises:
        CheckpointError: names the model, and those that are supported.
    """
    name = _unsupported(text)
    if name is not None:
        raise CheckpointError(
            f"config.json: the language model of this {where} is {name}, which is not supported yet; "
            "LLaMA 1 and 2, Vicuna, Yi and Mistral are, and MPT in the original's layout."
        )


def _unsupported(text: dict[str, Any]) -> str | None:
    kind = text["model_type"]
    if kind not in ("llama", "mistral", "mpt"):
        return str(kind)
    rotary = rotary_type(text)
    if kind == "llama" and (rotary == "llama3" or int(text.get("vocab_size") or 0) >= _LLAMA_3_VOCABULARY):
        return "Llama-3"
    return None if rotary in _ROTARY else f"a {kind} with {rotary!r} rotary positions"


def rotary_type(text: dict[str, Any]) -> str:
    """How rotary positions are scaled: `rope_parameters` since transformers 5, `rope_scaling` before."""
    settings = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return str(settings.get("rope_type") or settings.get("type") or "default")
