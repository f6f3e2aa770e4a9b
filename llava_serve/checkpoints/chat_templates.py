"""Finds a checkpoint's chat template among the files that can hold one, and judges it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import control_tokens, named_tokens
from llava_serve.errors import CheckpointError
from llava_serve.prompts.chat_probe import Judgement, judge
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.templates import TEMPLATES

_DEFAULT = "default"


def read_chat_template(folder: Path, tokenizer: TokenizerSpec, conv_mode: str | None) -> Judgement | None:
    """The chat template of a folder, None if it has none.

    Raises:
        CheckpointError: it cannot be called; or there are several, and none is named `default`. Beside a `conv_mode` of
            another template that does no harm.
    """
    try:
        return _judged(_default(find_templates(folder), folder), tokenizer)
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
        special_tokens=named_tokens(tokenizer.folder),
    )
    return judge(template)


def find_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name, in transformers' order of the files; a template without a name is
    `default`."""
    for name in ("processor_config.json", "chat_template.json"):
        if (template := read_json(folder, name, optional=True).get("chat_template")) is not None:
            return _by_name(template)
    named = {path.stem: path.read_text("utf-8-sig") for path in folder.glob("additional_chat_templates/*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        named[_DEFAULT] = (folder / "chat_template.jinja").read_text("utf-8-sig")
    return named or _by_name(read_json(folder, "tokenizer_config.json", optional=True).get("chat_template"))


def none_is_default(templates: Mapping[str, str]) -> str | None:
    """What is said of chat templates of which none is named `default`; None of others."""
    if not templates or _DEFAULT in templates:
        return None
    return f"are named {', '.join(sorted(templates))}, and none is named {_DEFAULT}"


def writes_chat_tokens(template: str, tokenizer: TokenizerSpec) -> bool:
    """Whether a template writes tokens that are in the vocabulary for it: not only those that begin or end a text."""
    tokens = {*control_tokens(tokenizer)} - {*named_tokens(tokenizer.folder).values()}
    return any(token in template for token in tokens)


def _default(templates: Mapping[str, str], folder: Path) -> str:
    if fault := none_is_default(templates):
        raise CheckpointError(f"The chat templates in {folder} {fault}: name the one to use so, or choose --conv-mode.")
    return templates.get(_DEFAULT, "")


def _by_name(written: Any) -> dict[str, str]:
    """Templates by name: a text, a dictionary or a list of named ones."""
    if isinstance(written, list):
        written = {each["name"]: each["template"] for each in written}
    if not isinstance(written, dict):
        written = {} if written is None else {_DEFAULT: written}
    return {str(name): str(template) for name, template in written.items()}
