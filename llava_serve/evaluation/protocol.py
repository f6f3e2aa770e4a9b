"""The original's protocol: one question about one picture at a time, greedy, in the template of its scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.errors import RequestError
from llava_serve.evaluation.files import Answer, Question
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams

MAX_NEW_TOKENS = 128
"""The original's, for short answers."""

CHUNK = 128
"""Questions that are prepared and answered together: their tiles are in memory at once."""


def template(spec: CheckpointSpec) -> str:
    """The template that the original's scripts use: `vicuna_v1`, as in training, where its command line and its server
    take `llava_v1`; else the checkpoint's own."""
    return "vicuna_v1" if spec.conv_mode == "llava_v1" else spec.conv_mode


def answer_questions(
    llm: LLM,
    questions: Sequence[Question],
    images: Path,
    sampling: SamplingParams,
    *,
    suffix: str,
    conv_mode: str,
) -> Iterator[Answer]:
    """Answers questions in their order.

    Args:
        images: the folder of their pictures.
        suffix: of each question that has none.

    Raises:
        RequestError: a picture cannot be used, or a question is too long; the message says which.
    """
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        prompts = [question.with_suffix(suffix) for question in chunk]
        sources = [None if question.image is None else images / question.image for question in chunk]
        try:
            results = llm.generate(prompts, images=sources, sampling=sampling, conv_mode=conv_mode)
        except RequestError as error:
            raise RequestError(f"Question {chunk[error.index or 0].question_id}: {error.message}") from None
        for question, prompt, result in zip(chunk, prompts, results, strict=True):
            yield Answer(question.question_id, prompt, result.text.strip(), model_id=llm.spec.name)
