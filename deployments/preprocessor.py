"""The picture tier: CPU replicas that turn messages into model input. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.handle_calls import returns_failure
from deployments.metrics import PreprocessorMetrics
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.processor import Processor
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.types import Message, PreparedPrompt, Query


class ImagePreprocessor:
    """Decodes, tiles, renders and tokenizes.

    Args:
        model: which checkpoint's description to follow; its weights are not read.
        images: limits of the pictures.
    """

    def __init__(self, model: ModelOptions, images: ImageOptions) -> None:
        spec = open_checkpoint(model.model, model.model_base, model.vision_tower, model.conv_mode, weights=False)
        # One request at a time: a replica uses one core and holds one decoded image. The tier scales by replicas.
        self._processor = ThreadedProcessor(Processor(spec, images), 1, PreprocessorMetrics().prepared)

    @returns_failure
    async def prepare(self, asked: Query | Sequence[Message], conv_mode: str | None, deadline: float) -> PreparedPrompt:
        """One prompt as model input.

        Raises:
            RequestError: the input is invalid; the class says how.
            DeadlineExceededError: the deadline passed before the work was done.
        """
        return await self._processor.prepare(lambda: asked, conv_mode=conv_mode, deadline=deadline)
