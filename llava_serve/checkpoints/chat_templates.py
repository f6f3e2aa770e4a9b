"""Finds a checkpoint's chat template among the files that can hold one, and judges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import control_tokens, tokenizer_template
from llava_serve.errors import CheckpointError
from llava_serve.prompts.chat_probe import Judgement, judge
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.templates import TEMPLATES

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The tokens that transformers gives a template by name."""


def read_chat_template(folder: Path, tokenizer: TokenizerSpec, conv_mode: str | None) -> Judgement | None:
    """The chat template of a folder, None if it has none.

    Raises:
        CheckpointError: it cannot be called; or there are several, and none is named `default`. Beside a `conv_mode` of
            another template that does no harm.
    """
    try:
        return _judged(find_template(folder), tokenizer)
    except CheckpointError:
        if conv_mode in TEMPLATES:
            return None
        raise


def _judged(text: str, tokenizer: TokenizerSpec) -> Judgement | None:
    if not text.strip():
        return None
    template = ChatTemplate(
        text,
        controls=control_tokens(tokenizer),
        image_token=tokenizer.image_token or "<image>",
        special_tokens=_special_tokens(tokenizer.folder),
    )
    return judge(template)


def find_template(folder: Path) -> str:
    """The text of the template named `default`, or of the only one, in transformers' order of the files; empty if there
    is none.

    Raises:
        CheckpointError: there are several, and none is named `default`.
    """
    for name in ("processor_config.json", "chat_template.json"):
        if (template := read_json(folder, name, optional=True).get("chat_template")) is not None:
            return _default(template, folder)
    named = {path.stem: path.read_text("utf-8-sig") for path in folder.glob("additional_chat_templates/*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = (folder / "chat_template.jinja").read_text("utf-8-sig")
    return _default(named, folder) if named else tokenizer_template(folder)


def writes_chat_tokens(template: str, tokenizer: TokenizerSpec) -> bool:
    """Whether a template writes tokens that are in the vocabulary for it: not only those that begin or end a text."""
    tokens = {*control_tokens(tokenizer)} - {*_special_tokens(tokenizer.folder).values()}
    return any(token in template for token in tokens)


def _default(template: Any, folder: Path) -> str:
    if isinstance(template, str):
        return template
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    if "default" not in template:
        raise CheckpointError(
            f"The chat templates in {folder} are named {', '.join(sorted(template))}, and none is named default: name "
            "the one to use so."
        )
    return str(template["default"])


def _special_tokens(folder: Path) -> dict[str, str]:
    config = read_json(folder, "special_tokens_map.json", optional=True)
    config |= read_json(folder, "tokenizer_config.json", optional=True)
    values = ((name, config.get(name)) for name in _SPECIAL)
    return {
        name: value["content"] if isinstance(value, dict) else str(value) for name, value in values if value is not None
    }
