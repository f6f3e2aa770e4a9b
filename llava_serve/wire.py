"""The base of all models of a request: strict types, and unknown fields refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from llava_serve.errors import UnsupportedParameterError, shown

Neutral = Callable[[object], bool]


class Wire(BaseModel):
    """Base: JSON types are strict (no "5" for 5), and null is the same as absent.

    An undeclared field is kept as an extra, so that `unsupported_fields` can tell values that ask for nothing from
    those that ask for something that this server does not support.

    Attributes:
        NEUTRAL: by the name of an undeclared field, which of its values ask for nothing; without an entry, `nothing`
            says so. Null always asks for nothing.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {}

    def field_name(self, param: str | None) -> str | None:
        """What this request calls the field that an error names as a chat completion does."""
        return param


def one_of(*values: object) -> Neutral:
    """These values ask for nothing; a number does so as an integer and as a float."""
    return lambda value: any(value == neutral and _kind(value) is _kind(neutral) for neutral in values)


def _kind(value: object) -> type:
    return float if type(value) is int else type(value)


def nothing(value: object) -> bool:
    """The rule for fields without an entry of their own: false and what is empty ask for nothing."""
    return value is False or (isinstance(value, str | list | dict) and not value)


def anything(value: object) -> bool:
    """A label or a hint: it changes no answer, so any value passes."""
    return True


def unsupported_fields(model: Wire, path: str = "") -> Iterator[str]:
    """The fields that ask for something unknown.

    Args:
        model: the parsed model; those in it are looked at, too.
        path: of the model in the request, with a final dot.
    """
    for name, value in (model.model_extra or {}).items():
        if value is not None and not model.NEUTRAL.get(name, nothing)(value):
            yield f"{path}{shown(name)}"
    for name, value in model:
        if isinstance(value, Wire):
            yield from unsupported_fields(value, f"{path}{name}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, Wire):
                    yield from unsupported_fields(item, f"{path}{name}[{number}].")


def refuse_extras(model: Wire, path: str = "") -> None:
    """Raises `UnsupportedParameterError` for the first field that asks for something unknown.

    Args:
        model, path: as for `unsupported_fields`.
    """
    for name in unsupported_fields(model, path):
        raise UnsupportedParameterError(f"This server does not support '{name}' as given; leave it out.", name)
