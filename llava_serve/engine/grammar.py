"""Grammars of structured output: compiled and cached off the engine's thread, followed token by token on it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable

import numpy as np
from cachetools import LRUCache
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from numpy.typing import NDArray

from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.errors import RequestError
from llava_serve.structured_output import StructuredOutput
from llava_serve.text.tokenizer import Tokenizer, load_tokenizer

_CACHED = 64
"""Compiled grammars that are kept."""
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}
"""JSON on one line: where white space is free, a model may go on with it to the longest answer."""

_NAMES: dict[str, str] = {"json": "JSON schema", "regex": "regular expression", "choice": "choice"}
_FAULTS: tuple[tuple[str, str], ...] = (
    ("unsatisfiable", "nothing matches it"),
    ("oneof", "of oneOf, at most one branch may match the same value: use anyOf"),
    ("format", "it asks for a 'format' that is not supported"),
    ("resource", "a $ref must name a part of the schema itself"),
    ("pointer", "a $ref names no part of the schema"),
    ("look-around", "look-around is not supported"),
    ("backreferences", "back-references are not supported"),
    ("too deep", "it is nested too deep"),
    ("too large", "it is too large"),
    ("limit", "it is too complex"),
    ("noextension", "nothing that ends matches it"),
)
"""What the library's message has in it, and what is reported to the caller."""
_UNSUPPORTED_KEYS = re.compile(r"Unimplemented keys: \[(.*)\]")


def too_complex(param: str | None = None) -> RequestError:
    """Of a form whose compiled grammar passes a limit, or fails, while it is followed."""
    return RequestError("The form that the answer must have is too complex to be followed.", param)


class Grammar:
    """A compiled grammar. Each sequence follows it with a matcher of its own.

    Args:
        start: a matcher at the start, which is shared.
        end_bit: of the library's own end token.
        param: the caller's name for the form, in errors.
    """

    def __init__(self, start: LLMatcher, end_bit: int, param: str) -> None:
        self._start = start
        self._end_bit = end_bit
        self._param = param

    def matcher(self, end_tokens: frozenset[int]) -> Matcher:
        """A matcher at the grammar's start.

        Args:
            end_tokens: ids that end an answer; allowed where the grammar is complete, and only there.
        """
        return Matcher(self._start.deep_copy(), self._end_bit, end_tokens, self._param)


class Matcher:
    """How far one sequence has come in its grammar. Preemption leaves it as it is, since the tokens stay."""

    def __init__(self, matcher: LLMatcher, end_bit: int, end_tokens: frozenset[int], param: str) -> None:
        self._matcher = matcher
        self._end_bit = end_bit
        self._end_tokens = end_tokens
        self._param = param

    @property
    def exhausted(self) -> bool:
        """The grammar is complete, and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> NDArray[np.uint8]:
        """The tokens that may come next: a bit per id, the lowest first, in bytes.

        Raises:
            RequestError: there is none, or the search for them passes a limit.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8).copy()
        if self._matcher.is_error():
            raise too_complex(self._param)
        accepting = self._matcher.is_accepting()
        for token in (self._end_bit, *self._end_tokens):
            at, bit = token // 8, 1 << token % 8
            if accepting and token != self._end_bit:
                bits[at] |= bit
            else:
                bits[at] &= ~bit & 0xFF
        if not bits.any():
            raise RequestError(
                "The form that the answer must have needs a text that the model has no tokens for.", self._param
            )
        return bits

    def advance(self, token: int) -> bool:
        """Takes a sampled token where it may come next. False where it may not; then nothing has changed.

        Raises:
            RequestError: following it passes a limit.
        """
        if token in self._end_tokens:
            return self._matcher.is_accepting()
        taken = self._matcher.try_consume_tokens([token]) == 1
        if self._matcher.is_error():
            raise too_complex(self._param)
        return taken


class GrammarCompiler:
    """Compiles grammars for the vocabulary of a model, and keeps the last ones. Any thread may call it.

    Args:
        vocabulary: ids that the model has.

    Attributes:
        check: called before a form is compiled; raises `RequestError` for one that is not to be. For servers, whose
            forms come from strangers.
    """

    def __init__(self, tokenizer: TokenizerSpec, vocabulary: int) -> None:
        self.check: Callable[[StructuredOutput, bool], None] = lambda asked, continues: None
        self._description = tokenizer
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._cache: LRUCache[tuple[str, str, bool], LLMatcher] = LRUCache(_CACHED)
        self._lock = threading.Lock()

    def compile(self, asked: StructuredOutput, *, continues: bool = False) -> Grammar:
        """The grammar of a form.

        Args:
            continues: the answer goes on from the prompt's text. Else a space may precede it, which is not part of the
                answer's text: the usual first token of an answer begins with one.

        Raises:
            RequestError: the form is malformed, or asks for what is not supported.
        """
        key = (asked.kind, asked.text, continues)
        with self._lock:
            start = self._cache.get(key)
        if start is None:
            start = self._compiled(asked, continues)
            with self._lock:
                self._cache[key] = start
        return Grammar(start, self._vocabulary, asked.param)

    def _compiled(self, asked: StructuredOutput, continues: bool) -> LLMatcher:
        self.check(asked, continues)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(load_tokenizer(self._description), self._vocabulary)
        return _compile(asked, self._tokenizer, continues)


def _compile(asked: StructuredOutput, tokenizer: LLTokenizer, continues: bool) -> LLMatcher:
    try:
        source = _SOURCES[asked.kind](asked.text)
    except Exception:  # of the library, about the caller's text
        raise _fault(asked, "") from None
    if not continues:
        first, *others = json.loads(source)["grammars"]
        space = {"lark_grammar": "start: / ?/ @answer"}
        source = json.dumps({"grammars": [space, {**first, "name": "answer"}, *others]})
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        trial = matcher.deep_copy()
        trial.compute_bitmask()  # the first takes the longest, and what it sets up is shared
        if not trial.is_error():
            return matcher
        matcher = trial
    raise _fault(asked, matcher.get_error())


def _choice(text: str) -> str:
    return str(LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(text)))))


def _context_free(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": grammar_from("grammar", text)}]})


def _json(text: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(text, overrides=_LAYOUT))  # type: ignore[arg-type]


_SOURCES: dict[str, Callable[[str], str]] = {
    "json": _json,
    "json_object": lambda _: _json('{"type": "object"}'),
    "regex": lambda text: str(LLMatcher.grammar_from_regex(text)),
    "choice": _choice,
    "grammar": _context_free,
}


def too_complex_to_compile(asked: StructuredOutput) -> RequestError:
    """For a form whose compiling passes a limit."""
    return _fault(asked, "limit")


def _fault(asked: StructuredOutput, message: str) -> RequestError:
    """A sentence about a form that cannot be compiled; of the library's message only names from the caller's text."""
    name = _NAMES.get(asked.kind, "grammar")
    if keys := _UNSUPPORTED_KEYS.search(message):
        named = [key for key in re.findall(r'"([$\w]+)"', keys[1]) if f'"{key}"' in asked.text]
        return RequestError(f"The {name} has keywords that are not supported: {', '.join(named)}.", asked.param)
    lowered = message.lower()
    reason = next(
        (reported for mark, reported in _FAULTS if mark in lowered), "it is malformed, or has what is not supported"
    )
    return RequestError(f"The {name} cannot be followed: {reason}.", asked.param)


def _tokenizer(tokenizer: Tokenizer, vocabulary: int) -> LLTokenizer:
    """The tokens' bytes, for the library. Its own end token stands behind the vocabulary and is never sampled."""
    vocabulary_bytes = [tokenizer.token_bytes(token) if token < tokenizer.size else b"" for token in range(vocabulary)]
    silent = [token for token, text in enumerate(vocabulary_bytes) if not text or not tokenizer.has_text(token)]
    for token in silent:
        vocabulary_bytes[token] = b"<%d>" % token

    class Vocabulary:
        eos_token_id = vocabulary
        bos_token_id = None
        tokens = [*vocabulary_bytes, b"<end>"]  # noqa: RUF012
        special_token_ids = [*silent, vocabulary]  # noqa: RUF012

        def __call__(self, text: str) -> list[int]:
            return made.greedy_tokenize(text)

    made = LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=vocabulary + 1)
    return made
