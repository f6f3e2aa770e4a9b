"""Writes the reference of all options from their types and docstrings.

python -m deployments.tools.config_reference > docs/configuration.md
"""

from __future__ import annotations

import re
import sys
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llava_serve.app_options import Probe
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, LinkHost, ModelOptions, RoutingOptions
from llava_serve.options import Options

GROUPS: tuple[tuple[str, str, type[Options]], ...] = (
    ("args", "The model", ModelOptions),
    ("args.engine", "The engine", EngineOptions),
    ("args.images", "Images", ImageOptions),
    ("args.images.links", "A host of links", LinkHost),
    ("args.api", "Access and limits", ApiOptions),
    ("args.probe", "Probes", Probe),
    ("request_router_kwargs", "The router", RoutingOptions),
)
"""Where the options stand in a config, a heading, and their type."""

INTRODUCTION = """# Configuration

<!-- Written by `python -m deployments.tools.config_reference > docs/configuration.md`; a test compares. -->

The config is Ray Serve's own. The application's options stand under `args`; an unknown one is refused by name. Begin
with the config that ships (`llava-serve serve --print-config > mine.yaml`); its comments explain what Ray reads: ports,
replicas, autoscaling, resources. In Python, the same options are `ModelOptions`, `EngineOptions`, `ImageOptions` of
`llava_serve`; `llava-serve ask`, `chat` and `serve --in-process` take the frequent ones as flags. Some change without a
restart, in a deployment's `user_config`: see [Changing what runs](operations.md).
"""


def main() -> int:
    """Prints the page."""
    sys.stdout.write(page())
    return 0


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([INTRODUCTION, *(_section(*group) for group in GROUPS)])


def _section(where: str, title: str, options: type[Options]) -> str:
    meanings = attribute_docs(options)
    lines = [
        f"| `{name}` | {_kind(field.annotation)} | {_default(name, field)} | {meanings[name]} |"
        for name, field in options.model_fields.items()
    ]
    return "\n".join(
        [f"## {title}", "", f"Under `{where}`.", "", "| option | values | default | |", "|---|---|---|---|", *lines, ""]
    )


def attribute_docs(options: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a type says of each attribute; several may share a sentence."""
    _, _, attributes = (options.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^ {8}(\w+(?:, \w+)*): (.+(?:\n {12}.+)*)", attributes, re.MULTILINE)
    return {name: _sentence(re.sub(r"\s+", " ", text)) for names, text in found for name in names.split(", ")}


def _sentence(text: str) -> str:
    return text if text.startswith("`") else text[0].upper() + text[1:]


def _kind(annotation: Any) -> str:
    """The values that a type takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in arguments)
    if origin is tuple:
        items = [one for one in arguments if one is not Ellipsis]
        return f"list of {_kind(items[0])}" if len(items) < len(arguments) else f"{len(items)} of {_kind(items[0])}"
    if arguments:  # a union
        return " or ".join(dict.fromkeys(_kind(one) for one in arguments if one is not type(None)))
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", LinkHost: "hosts"}
    return names.get(annotation, "network" if annotation in (IPv4Network, IPv6Network) else annotation.__name__)


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"`{value}` ({value >> 20} MiB)"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    raise SystemExit(main())
