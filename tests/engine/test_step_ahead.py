"""Steps that are launched before the one that precedes them is read: the same answers, and nothing is left of what a
sequence had computed behind its end. On a CPU, where such a step is computed at once."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from llava_serve.engine.batch_share import BatchShare
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor import sampler
from llava_serve.engine.sequence import Output
from llava_serve.errors import DeadlineExceededError, NumericalError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.tiny_engine import PROMPTS, TinyModel, check_blocks, engine, outcomes, prompt, run

LONG = SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True)
ASKED = prompt([1, 5, 6, 7])
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "n": 2},
    {"top_p": 0.8, "top_k": 30, "logprobs": 2},
    {"min_p": 0.05, "min_tokens": 5, "stop_token_ids": tuple(range(3, 60))},
    {"temperature": 0, "logit_bias": {7: 3.0}, "prompt_logprobs": 1},
]
"""What steps may be launched ahead for."""


def subject(model: TinyModel | None = None, *, ahead: bool = True, **options: Any) -> Engine:
    return engine(model or TinyModel(), ahead=ahead, **options)


def add(one: Engine, name: str, asked: PreparedPrompt = ASKED, sampling: SamplingParams = LONG, **kind: Any) -> None:
    one.add(one.validator.accept(name, asked, sampling, **kind))


def is_ahead(one: Engine) -> bool:
    """A step is launched whose predecessor is read."""
    return one._pipeline._next is not None


def steps(one: Engine) -> tuple[list[list[Output]], int]:
    """The outputs of each step to the end, and how many steps were launched ahead."""
    outputs, launched = [], 0
    while one.has_work:
        outputs.append(one.step())
        launched += is_ahead(one)
        check_blocks(one)
    assert one.stats.free_blocks == one.stats.total_blocks
    return outputs, launched


def ids(outputs: list[list[Output]], name: str = "r", index: int = 0) -> list[int]:
    each = [output for step in outputs for output in step if (output.request_id, output.index) == (name, index)]
    return [token for output in each for token in output.token_ids]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_outputs_and_counts_are_the_same(sampling: dict[str, Any]) -> None:
    """Prompts of several lengths, with images, more than there are places."""
    found, scores = [], []
    for ahead in (False, True):
        one = subject(ahead=ahead, max_num_seqs=3, max_batch_tokens=40, max_batch_tiles=2)
        chosen = SamplingParams(**{"max_new_tokens": 20, "seed": 3, **sampling})
        for at, each in enumerate(PROMPTS):
            add(one, f"r{at}", each, chosen)
        outputs, launched = steps(one)
        assert (launched > 5) == ahead
        by_choice: dict[tuple[str, int], list[Any]] = {}
        logprobs: list[float] = []
        for output in sorted((output for step in outputs for output in step), key=lambda each: each.request_id):
            entries = output.logprobs or ()
            by_choice.setdefault((output.request_id, output.index), []).append(
                (output.token_ids, output.finish_reason, output.num_cached_tokens, len(output.prompt_logprobs or ()))
            )
            logprobs += [value for entry in entries for value in (entry.logprob, *(top for _, top in entry.top))]
        counts = one.stats
        found.append((by_choice, counts.generated_tokens, counts.prompt_tokens, counts.queried_tokens))
        scores.append(sorted(logprobs))
    assert found[0] == found[1]
    assert scores[1] == pytest.approx(scores[0])


def test_an_answer_that_ends_by_its_length_computes_no_position_more() -> None:
    found = []
    for ahead in (False, True):
        one = subject(ahead=ahead)
        for at, count in enumerate((1, 2, 9)):
            add(one, f"r{at}", sampling=SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True))
        outputs, launched = steps(one)
        assert launched == (8 if ahead else 0)
        assert [len(ids(outputs, f"r{at}")) for at in range(3)] == [1, 2, 9]
        found.append((outputs[0][0].token_ids, one.stats.computed_tokens, one.stats.steps))
    assert found[0] == found[1]


def test_the_token_behind_the_end_is_dropped_and_the_blocks_are_free_at_once() -> None:
    (whole,) = run(subject(ahead=False), (ASKED, LONG))[0]
    at = next(at for at in range(3, 20) if whole[at] not in whole[:at])
    ending = dataclasses.replace(LONG, ignore_eos=False, stop_token_ids=(whole[at],))
    one = subject()
    add(one, "r", sampling=ending)
    outputs = []
    while one.has("r"):
        outputs.append(one.step())
    assert is_ahead(one), "the step behind the end is launched"
    assert one.stats.free_blocks == one.stats.total_blocks
    assert (ids(outputs), outputs[-1][0].finish_reason) == (whole[: at + 1], "stop")
    assert one.stats.generated_tokens == at + 1
    add(one, "r")
    (first,) = one.step()  # of the new request, which has the same id
    assert first.token_ids == (whole[0],)
    assert ids([[first], *steps(one)[0]]) == whole


def test_a_choice_goes_on_when_the_token_behind_another_ones_end_is_nan() -> None:
    """The end token of one choice makes NaN, if it is computed."""
    sampling = SamplingParams(temperature=1, seed=5, n=2, max_new_tokens=30, ignore_eos=True)
    model = TinyModel()
    whole = run(subject(model, ahead=False), (ASKED, sampling))[0]
    end = next(token for token in whole[0][2:9] if token not in {*whole[1], *whole[0][:2], *ASKED.token_ids.tolist()})
    model.language_model.get_input_embeddings().weight.data[end] = torch.nan
    one = subject(model)
    add(one, "r", sampling=dataclasses.replace(sampling, stop_token_ids=(end,)))
    outputs, launched = steps(one)
    assert launched > 20
    assert [ids(outputs, index=index) for index in range(2)] == [whole[0][: whole[0].index(end) + 1], whole[1]]


def test_only_the_request_with_nan_fails() -> None:
    model = TinyModel()
    other = prompt([1, 9, 9])
    (whole,), (neighbour,) = run(subject(model, ahead=False), (ASKED, LONG), (other, LONG))
    at = next(at for at in range(3, 20) if whole[at] not in whole[:at] and whole[at] not in neighbour)
    model.language_model.get_input_embeddings().weight.data[whole[at]] = torch.nan
    one = subject(model)
    add(one, "r")
    add(one, "other", other)
    outputs, _ = steps(one)
    assert ids(outputs) == whole[: at + 1]
    assert ids(outputs, "other") == neighbour
    assert [type(output.error) for step in outputs for output in step if output.error] == [NumericalError]


def test_what_is_aborted_while_its_step_is_launched_leaves_nothing() -> None:
    (whole,), (other,) = run(subject(ahead=False), (ASKED, LONG), (prompt([1, 9]), LONG))
    one = subject()
    add(one, "r")
    for _ in range(4):
        one.step()
    assert is_ahead(one)
    one.abort("r")
    add(one, "r", prompt([1, 9]))
    assert ids(steps(one)[0]) == other
    add(one, "r")
    add(one, "stays", prompt([1, 9]))
    outputs = [one.step() for _ in range(4)]
    one.abort("r")
    add(one, "r")
    outputs += steps(one)[0]
    assert ids(outputs, "stays") == other
    assert ids(outputs[4:]) == whole


def test_a_deadline_that_passes_ends_the_request_without_the_launched_token() -> None:
    one = subject()
    add(one, "r", deadline=time.time() + 1000)
    for _ in range(4):
        one.step()
    assert is_ahead(one)
    (group,) = one._scheduler.running
    group.request = dataclasses.replace(group.request, deadline=time.time() - 1)
    add(one, "other", prompt([1, 9]))
    outputs, _ = steps(one)
    assert [type(output.error) for output in outputs[0] if output.request_id == "r"] == [DeadlineExceededError]
    assert [ids(outputs), len(ids(outputs, "other"))] == [[], 30]


def test_a_request_that_comes_meanwhile_waits_for_one_step_at_most() -> None:
    """It is computed in the step behind the one that is launched."""
    expected = run(subject(ahead=False), (ASKED, LONG), (prompt([1, 9]), LONG))
    one = subject()
    add(one, "r")
    outputs = [one.step() for _ in range(4)]
    assert is_ahead(one)
    add(one, "late", prompt([1, 9]))
    outputs += [one.step() for _ in range(2)]
    assert not ids(outputs[:5], "late")
    assert len(ids(outputs, "late")) == 1
    outputs += steps(one)[0]
    assert [[ids(outputs)], [ids(outputs, "late")]] == expected


def test_where_no_place_is_free_what_waits_holds_up_no_step() -> None:
    one = subject(max_num_seqs=2)
    for at in range(3):
        add(one, f"r{at}", sampling=dataclasses.replace(LONG, max_new_tokens=10 + 10 * at))
    launched = []
    while one.has("r0"):
        one.step()
        launched.append(is_ahead(one))
    assert launched == [True] * 9 + [False]  # the last is known to end the first: the third takes its place
    assert len(ids(steps(one)[0], "r2")) == 30


@pytest.mark.parametrize("block_size", [1, 4])
def test_sequences_that_lack_blocks_are_preempted_and_answered(block_size: int) -> None:
    requests = [(prompt([1, 5, at]), LONG) for at in (6, 7, 8)]
    expected = run(subject(ahead=False), *requests)
    one = subject(blocks=70 // block_size, block_size=block_size, prefix_caching=False)
    assert outcomes(one, *requests) == expected
    assert one.stats.preemptions


@pytest.mark.parametrize(
    "sampling", [{"num_beams": 2, "temperature": 0}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.3}], ids=str
)
def test_what_needs_the_tokens_on_the_cpu_is_not_launched_ahead(sampling: dict[str, Any]) -> None:
    other = SamplingParams(**{"max_new_tokens": 6, "ignore_eos": True, "seed": 1, **sampling})
    expected = run(subject(ahead=False), (ASKED, LONG), (ASKED, other))
    one = subject()
    add(one, "r")
    add(one, "other", sampling=other)
    outputs = []
    while one.has("other"):
        outputs.append(one.step())
        assert not is_ahead(one)
    outputs += [one.step()]
    assert is_ahead(one), "the rest is"
    outputs += steps(one)[0]
    assert [[ids(outputs)], [ids(outputs, "other")]] == expected


@pytest.mark.parametrize(("sampling", "ahead"), [({"top_p": 0.99}, False), ({"top_p": 0.99, "top_k": 20}, True)])
def test_where_too_few_tokens_may_be_sorted_they_are_read_first(
    sampling: dict[str, Any], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without the kernel for top-p."""
    request = (ASKED, SamplingParams(temperature=1.5, seed=2, max_new_tokens=30, ignore_eos=True, **sampling))
    expected = run(subject(ahead=False), request)
    monkeypatch.setattr(sampler, "MAX_PARTIAL_SORT", 8)
    monkeypatch.setattr(sampler, "_answers_at_once", lambda _: False)
    one = subject()
    add(one, "r", *request)
    outputs, launched = steps(one)
    assert [[ids(outputs)]] == expected
    assert (launched > 20) == ahead


def test_batch_work_beside_online_requests_is_planned_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchShare, "_is_cheap", True)
    one = subject()
    add(one, "online", sampling=dataclasses.replace(LONG, max_new_tokens=60))
    add(one, "batch", prompt([1, 9]), priority=1)
    together = 0
    while one.has("batch"):
        one.step()
        beside = len(one._scheduler.running) == 2
        assert not (beside and is_ahead(one))
        together += beside
    assert together > 20
    assert steps(one)[1] > 20


def test_a_sequence_that_must_move_to_grow_does_so_in_a_step_of_its_own() -> None:
    """It comes to the end of the cache when the one that had the beginning has ended."""
    longest = dataclasses.replace(LONG, max_new_tokens=100)
    (short,), (whole,) = run(subject(ahead=False), (ASKED, LONG), (prompt([1, 9]), longest))
    ending = dataclasses.replace(longest, ignore_eos=False, stop_token_ids=tuple(short[5:]))
    one = subject(blocks=40, block_size=4)
    add(one, "short", sampling=ending)
    add(one, "r", prompt([1, 9]), longest)
    outputs, places, launched = [], [], []
    while one.has_work:
        if running := [group.sequences[0] for group in one._scheduler.running if group.request.request_id == "r"]:
            assert running[0].extent is not None
            places.append(running[0].extent.start)
        outputs.append(one.step())
        launched.append(is_ahead(one))
        check_blocks(one)
    assert ids(outputs) == whole
    assert len(ids(outputs, "short")) < 10
    assert len(set(places)) == 2
    assert launched.count(False) == 2  # behind the last step before the move, and at the end


def test_on_a_cpu_it_is_off() -> None:
    one = engine(TinyModel())
    add(one, "r")
    assert steps(one)[1] == 0
