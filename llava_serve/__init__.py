"""LLaVA, a model that answers questions about pictures, as a library, a command, and an application on Ray Serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_serve.config import EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import (
    AccessError,
    BodyTooLargeError,
    CapacityError,
    CheckpointError,
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    InvalidImageError,
    LlavaServeError,
    ModelStartingError,
    NumericalError,
    PromptTooLongError,
    RateLimitError,
    RequestError,
    UnknownModelError,
    UnsupportedMediaTypeError,
    UnsupportedParameterError,
)
from llava_serve.results import Completion, GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.structured_output import StructuredOutput
from llava_serve.types import Chunk, Conversation, Message, PreparedPrompt

if TYPE_CHECKING:
    from llava_serve.async_llm import AsyncLLM
    from llava_serve.inputs import Prompt
    from llava_serve.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AccessError",
    "AsyncLLM",
    "BodyTooLargeError",
    "CapacityError",
    "CheckpointError",
    "Chunk",
    "Completion",
    "Conversation",
    "DeadlineExceededError",
    "DrainingError",
    "EngineDeadError",
    "EngineOptions",
    "GenerationResult",
    "ImageOptions",
    "InvalidImageError",
    "LlavaServeError",
    "Message",
    "ModelOptions",
    "ModelStartingError",
    "NumericalError",
    "PreparedPrompt",
    "Prompt",
    "PromptTooLongError",
    "RateLimitError",
    "RequestError",
    "SamplingParams",
    "StructuredOutput",
    "UnknownModelError",
    "UnsupportedMediaTypeError",
    "UnsupportedParameterError",
]


_LAZY = {"LLM": "llava_serve.llm", "AsyncLLM": "llava_serve.async_llm", "Prompt": "llava_serve.inputs"}
"""The engines import torch, which takes seconds, and prompts Pillow: the command line and the CPU tier do without."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
