"""The base of all options: frozen pydantic models, as the `args` of `serve_config.yaml`. A typo is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llava_serve.errors import RequestError
from llava_serve.faults import option_fault


class Options(BaseModel):
    """Base: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        """Raises `RequestError` for an unknown option, or a value that is not allowed."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise option_fault(error) from None

    # Options inside of others are validated without the method above, so that a fault in them keeps its place.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


SomeOptions = TypeVar("SomeOptions", bound=Options)


def resolve_options(kind: type[SomeOptions], given: SomeOptions | None, name: str) -> SomeOptions:
    """The options that an argument of a constructor gives; None takes the defaults.

    Raises:
        RequestError: they are of another kind.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise RequestError(f"{name} must be {kind.__name__}(...); got a {type(given).__name__}.", name)
    return given


def changed(options: SomeOptions, given: Mapping[str, object]) -> SomeOptions:
    """Options with others of the same kind instead of some.

    Raises:
        RequestError: one is unknown, or has a value that is not allowed.
    """
    return type(options)(**{**options.model_dump(), **given})
