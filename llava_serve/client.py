"""`LlavaClient`: the running application for other Ray jobs. The one module of the library that needs Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_serve.ray_application import application_package

if TYPE_CHECKING:
    from deployments.client import LlavaClient

__all__ = ["LlavaClient"]


def __getattr__(name: str) -> Any:
    # Only when it is asked for: whatever looks through the library's modules does not import Ray.
    if name == "LlavaClient":
        return import_module(f"{application_package()}.client").LlavaClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
