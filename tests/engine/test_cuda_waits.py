"""How often a step waits for a GPU, and that the fast kernel is called as it can be. Without a GPU: on the meta device,
whose tensors have shapes and no values, so that every operation runs but for those that need a value on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_serve.engine.engine import Engine
from llava_serve.engine.executor import decoder, llama_decoder, sampler, varlen
from llava_serve.engine.executor.graph_sampling import SamplingKind, next_tokens
from llava_serve.engine.executor.kernels import twins
from llava_serve.engine.executor.model_runner import ModelRunner
from llava_serve.engine.executor.sampling_step import PendingStep
from llava_serve.engine.executor.step_result import StepResult
from llava_serve.engine.executor.transfer import HostCopy, to_device
from llava_serve.engine.failures import StepFailures
from llava_serve.engine.sequence import EngineRequest, Extent, Output, Sequence
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support import tiny_engine
from support.tiny_engine import TinyModel, image, prompt

META = torch.device("meta")
ALONE: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 3, "min_p": 0.01},
    {"temperature": 0, "logprobs": 4},
    {"logprobs": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": {3: 1.0}, "min_tokens": 3},
]


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies for which CUDA would wait. A copy to the CPU holds ones; all other reads of a value raise."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.to_host = self.to_device = 0
        self.pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operations that consist of others come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            if args[0].device == META:
                self.to_host += 1
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            self.to_device += not (kwargs.get("non_blocking") and any(one is args[0] for one in self.pinned))
        elif func is torch.ops.aten.copy_.default:
            assert args[0].device == args[1].device
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Refuses lists where a tensor is made or indexed on a device: torch copies them from pageable memory. Notes what
    is pinned, which needs a GPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            self._waits.pinned.append(args[0].clone())
            return self._waits.pinned[-1]
        if func is torch.tensor:
            assert torch.device(kwargs.get("device") or "cpu") != META, "a list is copied to the device"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(one, list) for one in index), "a list indexes a tensor on the device"
        return func(*args, **kwargs)


@contextmanager
def counted() -> Iterator[Waits]:
    """Counts the waits within."""
    waits = Waits()
    with _Calls(waits), waits:
        yield waits


class MetaModel(TinyModel):
    """A tiny model of heads that FlashAttention has, on the meta device."""

    def __init__(self, kind: str = "llama") -> None:
        super().__init__(kind, torch.bfloat16)
        self.device = META
        self.language_model.to(META)
        self._tower = self._tower.to(META)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Engine:
    monkeypatch.setattr(varlen, "available", lambda *_, **__: True)
    monkeypatch.setattr(llama_decoder, "DEVICES", {"meta"})
    # What compares or measures at the start needs values.
    monkeypatch.setattr(decoder, "output_head", lambda language_model: language_model.get_output_embeddings())
    monkeypatch.setattr(ModelRunner, "warm_up", lambda _: 1.0)
    kind, *float8 = getattr(request, "param", "llama").split()
    cache: dict[str, Any] = {"kv_cache_dtype": "fp8"} if float8 else {}
    model = MetaModel(kind)
    with counted():  # the scales of a cache in 8-bit floats come from a step
        subject = tiny_engine.engine(model, cuda_graphs=False, **cache)
    subject._runner._kernel = twins.decode_attention
    subject._prefill_budget.observe(0.001, 1, 0, 0)
    subject._prefill_budget.observe(0.001, 0, 4000, 0)
    return subject


def add(engine: Engine, one: PreparedPrompt, name: str, **sampling: Any) -> None:
    chosen = SamplingParams(**{"max_new_tokens": 20, "ignore_eos": True, "seed": 1, **sampling})
    engine.add(engine.validator.accept(name, one, chosen))


def step(engine: Engine) -> tuple[int, list[Output]]:
    """A step, and how often it has waited for the device."""
    with counted() as waits:
        outputs = engine.step()
    assert all(output.error is None for output in outputs), outputs
    assert waits.to_device == 0, "a copy from pageable memory"
    return waits.to_host, outputs


@pytest.mark.parametrize("sampling", ALONE, ids=str)
def test_a_step_waits_for_the_device_once_however_many_sequences_there_are(
    engine: Engine, sampling: dict[str, Any]
) -> None:
    for at in range(5):
        add(engine, prompt([5, 6, 7 + at]), f"r{at}", **sampling)
    for _ in range(4):  # prompts, then decoding
        waits, outputs = step(engine)
        assert (waits, len(outputs)) == (1, 5)


@pytest.mark.parametrize("engine", ["llama", "mpt", "mistral", "qwen3", "mistral fp8", "mpt fp8"], indirect=True)
def test_a_step_of_all_kinds_waits_once(engine: Engine) -> None:
    for at, sampling in enumerate(ALONE):
        add(engine, prompt([5, at + 2]), f"r{at}", **sampling)
    step(engine)
    add(engine, prompt([5, 6], image((1, 2, 3), 2), [8]), "image", temperature=0)
    answered = set()
    for _ in range(4):
        waits, outputs = step(engine)
        assert waits == 1
        answered |= {output.request_id for output in outputs}
    assert len(answered) == len(ALONE) + 1


def test_sampling_by_the_kernel_waits_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "top_p_kernel", lambda dtype, device: twins.sample_top_p)
    for at, sampling in enumerate(ALONE):
        add(engine, prompt([5, at + 2]), f"r{at}", **sampling)
    for _ in range(2):
        assert step(engine)[0] == 1


def test_one_step_ahead_a_step_is_read_behind_the_launch_of_the_next(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "top_p_kernel", lambda dtype, device: twins.sample_top_p)
    log: list[str] = []
    copies: list[HostCopy] = []
    forward, begin, values = decoder.Decoder.forward, HostCopy.__init__, HostCopy.values

    def launched(*args: Any) -> torch.Tensor:
        log.append("launch")
        return forward(*args)

    def begun(copy: HostCopy, parts: Any) -> None:
        begin(copy, parts)
        copies.append(copy)
        log.append(f"copy {len(copies)}")

    def read(copy: HostCopy) -> list[list[float]]:
        log.append(f"read {copies.index(copy) + 1}")
        return values(copy)

    monkeypatch.setattr(decoder.Decoder, "forward", launched)
    monkeypatch.setattr(HostCopy, "__init__", begun)
    monkeypatch.setattr(HostCopy, "values", read)
    engine._pipeline.ahead = True
    for at, sampling in enumerate((*ALONE[:6], ALONE[-1])):
        add(engine, prompt([5, at + 2]), f"r{at}", **sampling)
    for _ in range(3):
        waits, outputs = step(engine)
        assert (waits, len(outputs)) == (1, 7)
    first = ["launch", "copy 1", "launch", "copy 2", "read 1"]
    assert log == [*first, "launch", "copy 3", "read 2", "launch", "copy 4", "read 3"]


def test_a_step_of_tiles_alone_waits_for_them(engine: Engine) -> None:
    """Else its time, by which prefill is planned, is that of the launch."""
    add(engine, prompt(image((1, 2, 3), 12), [8]), "image", temperature=0)
    waits, outputs = step(engine)
    assert engine._counts.computed_tokens == 0
    assert (waits, outputs) == (1, [])


def test_a_beam_search_waits_once_beside_the_others(engine: Engine) -> None:
    add(engine, prompt([5, 6, 7]), "beams", temperature=0, num_beams=3)
    add(engine, prompt([5, 6, 8]), "single", temperature=0)
    for _ in range(3):
        assert step(engine)[0] == 2


@pytest.mark.parametrize(("sampling", "allows", "waited"), [({}, [1], 1), ({}, [0, 1], 2), ({"top_p": 0.5}, [1], 1)])
def test_a_grammar_costs_a_wait_only_where_it_refuses_a_token(
    sampling: dict[str, Any], allows: list[int], waited: int
) -> None:
    class Grammar:
        def allowed(self) -> np.ndarray[Any, Any]:
            return np.array([0b101], np.uint8)

        def advance(self, _: int) -> bool:
            return bool(allows.pop(0))

    request = EngineRequest("r", prompt([1]), SamplingParams(**sampling), None, 0, 0, 9, frozenset())
    sequence = Sequence(request, 0, [1], extent=Extent(0, 1), matcher=Grammar())  # type: ignore[arg-type]
    result = StepResult(
        torch.empty(1, 5, device=META), [], torch.ones(0, dtype=torch.bool, device=META), [], StepFailures(), 0.0
    )
    with counted() as waits:
        sampled = PendingStep(result, [sequence], {}, torch.bfloat16).read()
    assert (len(sampled.tokens), allows, sampled.failures.requests) == (1, [], {})
    assert (waits.to_host, waits.to_device) == (waited, 0)


@pytest.mark.parametrize("kind", SamplingKind)
def test_what_is_captured_waits_for_nothing(kind: SamplingKind) -> None:
    logits, numbers = torch.empty(4, 500, device=META), torch.empty(5, 4, dtype=torch.float64, device=META)
    with counted() as waits:
        tokens = next_tokens(logits, numbers, kind, twins.sample_top_p)
    assert (tokens.shape, tokens.dtype) == ((4,), torch.int64)
    assert (waits.to_host, waits.to_device) == (0, 0)


def test_prompt_logprobs_wait_once_more(engine: Engine) -> None:
    add(engine, prompt([5, 6, 7, 8, 9]), "scored", temperature=0, prompt_logprobs=2)
    assert step(engine)[0] == 2


def test_the_count_notices_what_waits() -> None:
    table = torch.empty(3, 4, device=META)
    for waiting in (
        lambda: table.sum().item(),
        lambda: bool((table > 0).all()),
        lambda: table.nonzero(),
        lambda: table[table > 0],
        lambda: table[[0, 1]],
        lambda: torch.tensor([1.0], device=META),
    ):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), counted():
            waiting()
    with counted() as waits:
        assert table.cpu().tolist() == [[1.0] * 4] * 3
        torch.tensor([1, 2]).to(META, non_blocking=True)
        to_device(torch.from_numpy(np.zeros(3)), META)
    assert (waits.to_host, waits.to_device) == (1, 1)


@pytest.mark.parametrize("alibi", [False, True])
def test_the_fast_kernel_has_the_parameters_that_it_is_called_with(alibi: bool) -> None:
    for groups, window, lengths in itertools.product((1, 4), (None, 9), ([1, 3], [1, 1])):
        query = torch.empty(1, 2 * groups, sum(lengths), 64, dtype=torch.bfloat16, device=META)
        keys = torch.empty(2, 64, 64, dtype=torch.bfloat16, device=META)
        slopes = torch.empty(2 * groups, device=META) if alibi else None
        with counted():
            extents = varlen.VarlenAttention.of(lengths, [40, 8], [17, 20], META)
            output = extents.attend(query, keys, keys, None, window, slopes)
        assert output.shape == (1, sum(lengths), 2 * groups, 64)


@pytest.mark.parametrize("wrong", [{"no_such": 1}, {"seqused_k": 3}])
def test_a_wrong_call_is_no_refusal_of_the_kernel(wrong: dict[str, Any]) -> None:
    query = torch.zeros(4, 8, 64)
    with pytest.raises(RuntimeError) as fault:
        varlen._OPERATION(query, query, query, None, None, 1, 1, 0.0, False, False, **wrong)
    assert varlen.is_wrong_call(fault.value)
    with pytest.raises(RuntimeError) as refusal:  # a CPU has no such kernel
        varlen._OPERATION(query, query, query, None, None, 1, 1, 0.0, False, False)
    assert not varlen.is_wrong_call(refusal.value)
