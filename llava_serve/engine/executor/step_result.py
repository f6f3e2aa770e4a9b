"""What a step gives, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_serve.engine.failures import StepFailures
from llava_serve.engine.sequence import PromptLogprobs, Sequence


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has computed.

    Attributes:
        logits: [sampled, vocabulary] of the segments that need sampling, in their order, in float32 or better.
        checked: what was checked for NaN and infinity: logits or keys and values of a sequence, features of the image
            with a digest.
        finite: bool [checked], on the device: there were none.
        prompt_logprobs: of sequences whose request asks for them, those that the step's prefill gives.
        failures: of what the step has tried.
        vision_s: seconds in the vision tower, as this thread sees them: a GPU may go on with it meanwhile.
        ids: int64 [sampled], the next tokens, where the step has sampled them. The next step overwrites them.
    """

    logits: torch.Tensor
    checked: list[Sequence | str]
    finite: torch.Tensor
    prompt_logprobs: list[tuple[Sequence, PromptLogprobs]]
    failures: StepFailures
    vision_s: float
    ids: torch.Tensor | None = None
