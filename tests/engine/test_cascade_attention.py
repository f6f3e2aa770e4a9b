"""Cascade attention: which sequences share a prefix, and that the answers stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llava_serve.engine.executor import cascade_attention
from llava_serve.engine.executor.cascade_attention import SharedPrefix, attend_shared_prefix, find_shared_prefixes
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import TinyModel, engine, image, prompt, run

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def chain(*parts: tuple[str, int]) -> list[bytes]:
    """Hashes of a sequence's blocks; each covers all blocks before it."""
    hashes: list[bytes] = []
    for name, blocks in parts:
        hashes += [f"{hashes[-1].hex() if hashes else ''}{name}{at}".encode()[-16:] for at in range(blocks)]
    return hashes


def test_sequences_are_grouped_by_their_shared_prefix_where_that_saves_enough() -> None:
    one = [chain(("system", 2), ("cat", 40), (f"question {at}", 3)) for at in range(4)]
    other = [chain(("system", 2), ("dog", 200)) for _ in range(2)]
    single = [chain(("system", 2), ("sea", 300)), chain(("system", 2))]
    hashes = [one[0], other[0], single[0], one[1], single[1], one[2], other[1], one[3]]
    assert find_shared_prefixes(hashes, 16) == [SharedPrefix((0, 3, 5, 7), 42 * 16), SharedPrefix((1, 6), 202 * 16)]
    assert find_shared_prefixes(hashes[:4], 16) == []  # two sequences that share 672 positions are faster one by one
    assert find_shared_prefixes([[], *single], 16) == []


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_to_prefix_and_suffix_is_attention_to_all(kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def keys(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random(1, kv_heads, count, 16), random(1, kv_heads, count, 16)

    queries, common, own = [random(1, 4, 1, 16) for _ in range(3)], keys(50), [keys(count) for count in (1, 7, 90)]
    expected = []
    for query, pair in zip(queries, own, strict=True):
        key, value = (
            torch.cat(halves, 2).repeat_interleave(4 // kv_heads, 1) for halves in zip(common, pair, strict=True)
        )
        expected.append((query @ key.mT * 0.3).softmax(-1) @ value)

    def cast(pair: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return pair[0].to(dtype), pair[1].to(dtype)

    given = attend_shared_prefix(
        [query.to(dtype) for query in queries], cast(common), [cast(pair) for pair in own], 0.3
    )
    loose: dict[str, Any] = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    for output, right in zip(given, expected, strict=True):
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), right, **loose)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_answers_stay_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions about one image, choices of one prompt, and beams. Sliding windows do without."""
    requests = [
        (prompt(1, image((9, 9, 9), 6), [4 + at]), GREEDY) for at in range(3)
    ] + [
        (prompt(1, image((7, 7, 7), 5), [4]), SamplingParams(temperature=0.7, n=3, seed=1, max_new_tokens=9)),
        (prompt(1, image((7, 7, 7), 5), [4]), SamplingParams(temperature=0, num_beams=3, max_new_tokens=9)),
        (prompt(1, [5, 6, 7]), GREEDY),
    ]  # fmt: skip
    expected = run(engine(TinyModel(kind), blocks=256), *requests)
    monkeypatch.setattr(cascade_attention, "_MIN_SHARED", 8)
    monkeypatch.setattr(cascade_attention, "_MIN_SAVED", 8)
    found = []

    def spy(hashes: Sequence[Sequence[bytes]], block_size: int) -> list[SharedPrefix]:
        found.append(find_shared_prefixes(hashes, block_size))
        return found[-1]

    monkeypatch.setattr("llava_serve.engine.executor.model_runner.find_shared_prefixes", spy)
    subject = engine(TinyModel(kind), blocks=256)
    for _ in range(2):
        assert run(subject, *requests) == expected
    assert max(len(prefixes) for prefixes in found) == 2
    assert {len(prefix.indices) for prefixes in found for prefix in prefixes} >= {3, 6}
