"""Fields that this server does not do: accepted where they ask for nothing, refused by name where they ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from llava_serve.api.schema import ChatRequest, StreamOptions, Wire, WireMessage
from llava_serve.errors import UnsupportedParameterError

Neutral = Callable[[object], bool]


def _one_of(*values: object) -> Neutral:
    return lambda value: any(value == neutral and type(value) is type(neutral) for neutral in values)


def _anything(value: object) -> bool:
    return True


NEUTRAL: Mapping[type[Wire], Mapping[str, Neutral]] = {
    ChatRequest: {
        "function_call": _one_of("none", "auto"),
        "functions": _one_of([]),
        "logit_bias": _one_of({}),
        "metadata": _anything,
        "modalities": _one_of(["text"]),
        "parallel_tool_calls": _one_of(True, False),
        "prompt_cache_key": _anything,
        "prompt_cache_options": _anything,
        "prompt_cache_retention": _anything,
        "reasoning_effort": _one_of("none"),
        "response_format": _one_of({"type": "text"}),
        "safety_identifier": _anything,
        "service_tier": _one_of("auto", "default"),
        "store": _one_of(False),
        "tool_choice": _one_of("none", "auto"),
        "tools": _one_of([]),
        "verbosity": _one_of("medium"),
    },
    WireMessage: {"tool_calls": _one_of([]), "annotations": _one_of([])},
    StreamOptions: {"include_obfuscation": _one_of(False)},
}
"""What a field may say without asking for anything; null says nothing anywhere.

Labels and cache hints change no answer, so any value of them passes.
"""


def refuse_extras(request: ChatRequest) -> None:
    """Raises `UnsupportedParameterError` for the first field that asks for something unknown."""
    for path in _asking(request, ""):
        raise UnsupportedParameterError(f"This server does not support '{path}' as given; leave it out.", path)


def _asking(model: Wire, path: str) -> Iterator[str]:
    neutral = NEUTRAL.get(type(model), {})
    for name, value in (model.model_extra or {}).items():
        if value is not None and not (name in neutral and neutral[name](value)):
            yield f"{path}{name}"
    for name, value in model:
        if isinstance(value, Wire):
            yield from _asking(value, f"{path}{name}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, Wire):
                    yield from _asking(item, f"{path}{name}[{number}].")
