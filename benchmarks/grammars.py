"""Structured output by llguidance, which the library uses, and by xgrammar: what each costs, takes and refuses.

    pip install --no-deps --target FOLDER xgrammar apache-tvm-ffi
    PYTHONPATH=FOLDER python -m benchmarks.grammars [--output benchmarks/results/grammars.json]

For each vocabulary, the one that ships and two that are made of the standard library's words: the time to compile each
form until its first mask is there, and the time of a step, in which each of 16 sequences gets a mask and takes a token,
one after the other. They follow the right answers of all forms that both libraries take. Times are processor time of
this process, the least of the rounds. Each form also has a wrong answer. Without xgrammar only llguidance is measured.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, grammar_from

from benchmarks.machine import machine
from benchmarks.options import make_parser, parse
from llava_serve.checkpoints import open_checkpoint
from llava_serve.text.tokenizer import load_tokenizer
from testbed.grammar_forms import FORMS, Form

BATCH = 16
SHIPPED = "builtin"
VOCABULARIES = (SHIPPED, "32000", "150000")
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
_MISSING = "xgrammar is not installed, so only llguidance is measured: see the first lines of this file."


class Library(Protocol):
    """One of the two. A grammar is compiled once; each sequence follows it with a matcher of its own."""

    def compile(self, form: Form) -> Any:
        """The grammar, with its first mask computed. Raises ValueError or RuntimeError for a form that it refuses."""
        ...

    def matcher(self, grammar: Any) -> Any:
        """A matcher at the grammar's start."""
        ...

    def mask(self, matcher: Any) -> Any:
        """Computes which tokens may come next."""
        ...

    def take(self, matcher: Any, token: int) -> bool:
        """Goes on with a token; False where it may not come next."""
        ...

    def complete(self, matcher: Any) -> bool:
        """The answer may end here."""
        ...


class Guidance:
    """llguidance."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        class Vocabulary:
            eos_token_id = len(vocabulary)
            bos_token_id = None
            tokens = [*vocabulary, b"<end>"]  # noqa: RUF012
            special_token_ids = [len(vocabulary)]  # noqa: RUF012

            def __call__(self, text: str) -> list[int]:
                return made.greedy_tokenize(text)

        made = LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=len(vocabulary) + 1)
        self._tokenizer = made

    def compile(self, form: Form) -> LLMatcher:
        """As `Library` says."""
        sources: dict[str, Callable[[], str]] = {
            "json": lambda: LLMatcher.grammar_from_json_schema(form.text, overrides=_LAYOUT),  # type: ignore[arg-type]
            "regex": lambda: LLMatcher.grammar_from_regex(form.text),
            "grammar": lambda: json.dumps({"grammars": [{"lark_grammar": grammar_from("grammar", form.text)}]}),
        }
        grammar = LLMatcher(self._tokenizer, sources[form.kind](), log_level=0)
        if not grammar.is_error():
            grammar.deep_copy().compute_bitmask()
        if grammar.is_error():
            raise ValueError(grammar.get_error())
        return grammar

    def matcher(self, grammar: LLMatcher) -> LLMatcher:
        """As `Library` says."""
        return grammar.deep_copy()

    def mask(self, matcher: LLMatcher) -> bytes:
        """As `Library` says."""
        return matcher.compute_bitmask()

    def take(self, matcher: LLMatcher, token: int) -> bool:
        """As `Library` says."""
        return matcher.try_consume_tokens([token]) == 1

    def complete(self, matcher: LLMatcher) -> bool:
        """As `Library` says."""
        return matcher.is_accepting()


class XGrammar:
    """xgrammar, without its cache, and with JSON Schema's own rule for properties that a schema does not name."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._library = xgrammar = import_module("xgrammar")
        size = len(vocabulary) + 1
        tokens = xgrammar.TokenizerInfo([*vocabulary, b""], vocab_size=size, stop_token_ids=[len(vocabulary)])
        self._compiler = xgrammar.GrammarCompiler(tokens, cache_enabled=False)
        self._bits = np.zeros((1, -(-size // 32)), np.int32)

    def compile(self, form: Form) -> Any:
        """As `Library` says."""
        if form.kind == "json":
            grammar = self._compiler.compile_json_schema(form.text, any_whitespace=False, strict_mode=False)
        elif form.kind == "regex":
            grammar = self._compiler.compile_regex(form.text)
        else:
            grammar = self._compiler.compile_grammar(form.text)
        self.mask(self.matcher(grammar))
        return grammar

    def matcher(self, grammar: Any) -> Any:
        """As `Library` says."""
        return self._library.GrammarMatcher(grammar)

    def mask(self, matcher: Any) -> Any:
        """As `Library` says."""
        return matcher.fill_next_token_bitmask(self._bits, 0)

    def take(self, matcher: Any, token: int) -> bool:
        """As `Library` says."""
        return bool(matcher.accept_token(token))

    def complete(self, matcher: Any) -> bool:
        """As `Library` says."""
        return bool(matcher.is_completed())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--vocabularies", nargs="+", default=VOCABULARIES, metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    options = parse(parser, vocabularies=[SHIPPED], rounds=1, steps=20)
    libraries: dict[str, Callable[[Sequence[bytes]], Library]] = {"llguidance": Guidance}
    if find_spec("xgrammar") is None:
        print(_MISSING)
    else:
        import_module("xgrammar")  # before anything is measured
        libraries["xgrammar"] = XGrammar
    report: dict[str, Any] = {"machine": machine(), "batch": BATCH}
    for name in options.vocabularies:
        pieces = shipped_pieces() if name == SHIPPED else made_pieces(int(name))
        made = {library: Compiled(make, pieces, options.rounds) for library, make in libraries.items()}
        common = [form for form in FORMS if all(form.name in each.right for each in made.values())]
        for each in made.values():
            each.measure_steps(common, options.rounds, options.steps)
        report[name] = {"tokens": len(pieces)} | {library: each.figures for library, each in made.items()}
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def shipped_pieces() -> list[bytes]:
    """The texts of the tokens that the model that ships has."""
    tokenizer = load_tokenizer(open_checkpoint(SHIPPED).tokenizer)
    return [tokenizer.token_bytes(token) or b"<%d>" % token for token in range(tokenizer.size)]


def made_pieces(size: int) -> list[bytes]:
    """Every byte, and the most frequent beginnings of words, numbers and marks in Python's standard library."""
    counts: Counter[bytes] = Counter()
    words: Counter[bytes] = Counter()
    for path in sorted(Path(os.__file__).parent.glob("*.py")) + sorted(Path(os.__file__).parent.glob("[a-z]*/*.py")):
        words.update(re.findall(rb" ?[A-Za-z]+| ?[0-9]+|[^\sA-Za-z0-9]+|\s+", path.read_bytes()))
    for word, count in words.items():
        for end in range(2, min(len(word), 16) + 1):
            counts[word[:end]] += count
    pieces = [bytes([byte]) for byte in range(256)] + [piece for piece, _ in counts.most_common(size - 256)]
    if len(pieces) < size:
        raise ValueError(f"The standard library has words for {len(pieces)} tokens only.")
    return pieces


class Compiled:
    """All forms, compiled by a library for a vocabulary.

    Attributes:
        grammars: by the form's name, without those that the library refuses.
        right: names of the forms whose right answer it takes.
        figures: times in milliseconds.
    """

    def __init__(self, make: Callable[[Sequence[bytes]], Library], pieces: Sequence[bytes], rounds: int) -> None:
        began = time.process_time()
        self.library = make(pieces)
        setup = (time.process_time() - began) * 1e3
        self.grammars: dict[str, Any] = {}
        times: dict[str, float] = {}
        for form in FORMS:
            with suppress(ValueError, RuntimeError):
                times[form.name] = min(self._compile(form) for _ in range(rounds))
        self._tokenize = tokenizer_of(pieces)
        known = [form for form in FORMS if form.name in times]
        self.right = [form.name for form in known if self._takes(form, form.right)]
        self.figures: dict[str, Any] = {
            "vocabulary_ms": round(setup, 1),
            "compile_ms": {name: round(taken, 3) for name, taken in times.items()},
            "compile_median_ms": round(median(times.values()), 3),
            "compile_longest_ms": round(max(times.values()), 3),
            "refused": [form.name for form in FORMS if form not in known],
            "right_answers_not_taken": [form.name for form in known if form.name not in self.right],
            "wrong_answers_taken": [form.name for form in known if self._takes(form, form.wrong)],
        }

    def measure_steps(self, forms: Sequence[Form], rounds: int, steps: int) -> None:
        """Adds the times of a step to the figures. The sequences follow the right answers of these forms."""
        answers = [(self.grammars[form.name], self._tokenize(form.right)) for form in forms]
        taken = min((step_times(self.library, answers, steps) for _ in range(rounds)), key=median)
        p95 = float(np.percentile(taken, 95))
        for name, value in (("median", median(taken)), ("p95", p95), ("longest", max(taken))):
            self.figures[f"step_{name}_ms"] = round(value, 3)

    def _compile(self, form: Form) -> float:
        began = time.process_time()
        self.grammars[form.name] = self.library.compile(form)
        return (time.process_time() - began) * 1e3

    def _takes(self, form: Form, text: str) -> bool:
        matcher = self.library.matcher(self.grammars[form.name])
        every = all(self.library.take(matcher, token) for token in self._tokenize(text))
        return every and self.library.complete(matcher)


def step_times(library: Library, answers: Sequence[tuple[Any, list[int]]], steps: int) -> list[float]:
    """Milliseconds of each step of a batch whose sequences follow the answers, each from another one on."""
    following: list[tuple[Any, list[int]]] = []
    nexts = list(range(BATCH))
    taken = []
    for _ in range(steps):
        began = time.process_time()
        for at in range(BATCH):
            if at == len(following) or not following[at][1]:
                grammar, tokens = answers[nexts[at] % len(answers)]
                nexts[at] += 1
                following[at : at + 1] = [(library.matcher(grammar), tokens[::-1])]
            matcher, rest = following[at]
            library.mask(matcher)
            library.take(matcher, rest.pop())
        taken.append((time.process_time() - began) * 1e3)
    return taken


def tokenizer_of(pieces: Sequence[bytes]) -> Callable[[str], list[int]]:
    """Splits a text into the longest pieces, from its beginning."""
    ids = {piece: token for token, piece in enumerate(pieces)}
    longest = max(map(len, pieces))

    def tokenize(text: str) -> list[int]:
        rest, tokens = text.encode(), []
        while rest:
            piece = next(rest[:end] for end in range(longest, 0, -1) if rest[:end] in ids)
            tokens.append(ids[piece])
            rest = rest[len(piece) :]
        return tokens

    return tokenize


if __name__ == "__main__":
    main()
