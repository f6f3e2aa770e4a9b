"""The sandbox in which chat templates run: transformers' (Jinja's immutable one), with limits on time and size.

Not bounded: the memory and time of one built-in operation on values within the limits, such as a sort.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_serve.errors import LlavaServeError

MAX_SOURCE = 256 << 10
"""Characters of a template."""
MAX_SIZE = 8 << 20
"""Characters of the output, and characters or elements of every value on the way."""
MAX_SECONDS = 5.0
"""Of the thread's own time, which a busy machine does not lengthen."""
_MAX_BITS = 4096
"""Of a number."""

# None of these gives more than it gets, but for those that are replaced below. `center`, `format`, `indent` and others
# make a text of any width from a few characters.
_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
    *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("safe", "select", "selectattr", "sort", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
_GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
_TEXT_METHODS = frozenset(
    {
        *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace"),
        *("isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
        *("rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
    }
)
_JINJAS_OWN = {"_loop_vars", "_block_vars"}
"""Arguments that Jinja adds to a call inside a loop or a block."""
_budget = threading.local()


class TemplateLimitError(SecurityError):
    """A template passes a limit."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that `render` can bound. Loops, calls and operators count; what grows is measured first."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=measured, optimized=False, **options)
        ours = {"replace": _replace, "join": _join, "string": _string, "tojson": _tojson}
        self.filters = {name: self.filters[name] for name in _FILTERS} | ours | {"_each": _each, "_concat": _concat}
        self.globals = {name: self.globals[name] for name in _GLOBALS}

    def compiled(self, source: str) -> Template:
        """A template.

        Raises:
            TemplateError: it is no template, or too long or nested too deeply.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"The template has more than {MAX_SOURCE:,} characters.")
        try:
            return self.from_string(source)
        except TemplateError:
            raise
        except Exception as error:  # such as a recursion in the compiler
            raise TemplateRuntimeError("The template cannot be compiled.") from error

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The tree, with every loop and every `~` through a filter of ours."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_each", [], [], None, None, lineno=loop.lineno)
        for each in list(tree.find_all(nodes.Concat)):
            parts = nodes.List(each.nodes, lineno=each.lineno)
            each.nodes = [nodes.Filter(parts, "_concat", [], [], None, None, lineno=each.lineno)]
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        return not isinstance(obj, int | float | bytes) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja's own `format` makes texts of any width; without it `is_safe_attribute` decides."""

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            given = {key: value for key, value in kwargs.items() if key not in _JINJAS_OWN}
            return _replace(context, owner, *args, **given)
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return _join(context, args[0], owner)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateLimitError("A number is too large.")
        elif operator == "%" and not isinstance(left, float | int):
            raise TemplateLimitError("Texts are not formatted with %.")
        elif operator == "*":
            _check_size(_length(left) * right if isinstance(right, int) else _length(right) * _number(left))
        elif operator == "+":
            _check_size(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Renders a template of a `LimitedEnvironment`.

    Raises:
        TemplateError: it fails, or passes a limit (`TemplateLimitError`).
        LlavaServeError: what its own functions raise.
    """
    _budget.end = time.thread_time() + MAX_SECONDS
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(**variables):
            _tick()
            size += len(part)
            _check_size(size)
            parts.append(part)
    except (TemplateError, LlavaServeError):
        raise
    except Exception as error:
        raise TemplateRuntimeError("The template fails.") from error
    return "".join(parts)


def measured(value: Any) -> Any:
    """The value, which may be written as text: all that is nested in it is within the limit, repetitions counted."""
    size, waiting = 0, [value]
    while waiting:
        _tick()
        one = waiting.pop()
        size += len(one) if isinstance(one, str) else 1
        _check_size(size)
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += one
    return value


def _tick() -> None:
    if time.thread_time() > _budget.end:
        raise TemplateLimitError(f"The template runs for more than {MAX_SECONDS:g} s.")


def _check_size(size: float) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError(f"A text or list of the template has more than {MAX_SIZE:,} characters or elements.")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


@pass_context
def _each(context: Context, items: Any) -> Iterator[Any]:
    """The items of a loop."""
    if isinstance(items, Undefined):
        items = iter(items)
    for item in items:
        _tick()
        yield item


@pass_context
def _concat(context: Context, parts: Iterable[Any]) -> str:
    return _join(context, parts)


@pass_context
def _replace(context: Context, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = (str(measured(each)) for each in (text, old, new))
    _check_size(len(text) + text.count(old) * len(new))
    replaced: str = text.replace(old, new, -1 if count is None else count)
    return replaced


@pass_context
def _join(context: Context, items: Any, d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        items = map(make_attrgetter(context.environment, attribute), items)
    texts, separator = [], str(measured(d))
    size = 0
    for item in items:
        _tick()
        texts.append(str(measured(item)))
        size += len(texts[-1]) + len(separator)
        _check_size(size)
    return separator.join(texts)


@pass_context
def _string(context: Context, value: Any) -> str:
    return str(measured(value))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: Jinja's own escapes HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateLimitError("tojson indents by 16 at most.")
    if separators is not None:
        separators = [str(measured(each))[:16] for each in separators]
    return json.dumps(
        measured(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
