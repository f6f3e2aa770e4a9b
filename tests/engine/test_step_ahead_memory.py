"""The blocks of a sequence that has ended are free while a GPU may still have to compute the position behind it."""

from __future__ import annotations

import pytest
import torch

from llava_serve.engine.executor.step_result import StepResult
from llava_serve.engine.scheduler import Schedule
from llava_serve.engine.sequence import Sequence
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import TinyModel, check_blocks, engine, prompt, run


@pytest.mark.parametrize("block_size", [1, 4])
def test_what_is_written_behind_an_end_when_the_blocks_are_free_is_in_nobodys_way(block_size: int) -> None:
    """As late as it can be, right before what is launched next, and NaN. Other sequences take the blocks."""
    ends = tuple(range(3, 20))
    requests = [
        (prompt([1, *range(3, 12), at]), SamplingParams(seed=at, max_new_tokens=20, stop_token_ids=ends))
        for at in range(24)
    ]
    model = TinyModel()
    expected = run(engine(model, prefix_caching=False), *requests)
    subject = engine(model, ahead=True, blocks=64 // block_size, block_size=block_size, max_num_seqs=3)
    compute, memory = subject._runner.run, subject._runner._memory._memory
    launched: list[tuple[Sequence, int]] = []

    def noted(schedule: Schedule, sampled: torch.Tensor | None = None) -> StepResult:
        launched.clear()
        for segment in schedule.segments:
            assert segment.sequence.extent is not None
            launched.append((segment.sequence, segment.sequence.extent.start * block_size + segment.start))
        return compute(schedule, sampled)

    subject._runner.run = noted  # type: ignore[method-assign]
    for at, request in enumerate(requests):
        subject.add(subject.validator.accept(str(at), *request))
    answers: dict[str, list[int]] = {str(at): [] for at in range(len(requests))}
    late = 0
    while subject.has_work:
        for output in subject.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
        if subject._pipeline._next is not None:
            for sequence, position in launched:
                if not sequence.is_running:
                    memory[..., position, :] = torch.nan
                    late += 1
        check_blocks(subject)
    assert [[answer] for answer in answers.values()] == expected
    assert late
