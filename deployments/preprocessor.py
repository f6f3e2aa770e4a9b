"""The picture tier: CPU replicas that turn messages into model input. Imports neither torch nor transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ray

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.processor import Processor
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, PreparedPrompt

from .handle_calls import returns_failure
from .metrics import RayExporter


class ImagePreprocessor:
    """Decodes, tiles, renders and tokenizes.

    Args:
        model: which checkpoint's description to follow; its weights are not read.
        images: limits of the images. They are decoded in child processes, which can be ended.
        max_model_len: as in `EngineOptions`.
    """

    def __init__(self, model: ModelOptions, images: ImageOptions, max_model_len: int | None = None) -> None:
        spec = open_checkpoint(model, weights=False)
        spec = spec.limited_to(max_model_len)
        # As many requests at once as the replica has cores: each holds one decoded image, in a process of its own.
        processor = Processor(spec, images.isolated)
        processor.metrics.export_to(RayExporter(spec.name))
        self._processor = ThreadedProcessor(processor, _num_cpus())

    @returns_failure
    async def prepare(
        self, asked: Asked, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        """One prompt as model input. Prompts of different salts share nothing that is cached. Of those that wait, the
        one of the smallest priority number is next.

        Raises:
            RequestError: the input is invalid; the class says how.
            DeadlineExceededError: the deadline passed before the work was done.
        """
        return await self._processor.prepare(
            lambda: asked, conv_mode=conv_mode, deadline=deadline, cache_salt=cache_salt, priority=priority
        )

    @returns_failure
    async def tokenize(self, asked: Asked, conv_mode: str | None, deadline: float, texts: bool) -> TokenizedPrompt:
        """The tokens of a prompt.

        Raises:
            RequestError, DeadlineExceededError: as `prepare`.
        """
        return await self._processor.tokenize(asked, conv_mode=conv_mode, deadline=deadline, texts=texts)

    @returns_failure
    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; `RequestError` for one outside the vocabulary."""
        return await self._processor.detokenize(token_ids)

    @returns_failure
    async def describe(self) -> ModelDescription:
        """What the model takes."""
        return self._processor.processor.description


def _num_cpus() -> int:
    """The cores that Serve has given to this replica; a part of one is one."""
    if not ray.is_initialized():
        return 1
    cpus: float = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, math.ceil(cpus))
