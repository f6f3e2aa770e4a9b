"""The picture tier: CPU replicas that turn messages into model input. Imports neither torch nor transformers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from deployments.deadline import check_deadline
from deployments.metrics import PreprocessorMetrics
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.errors import DeadlineExceededError
from llava_serve.processor import Processor
from llava_serve.types import Message, PreparedPrompt


class ImagePreprocessor:
    """Decodes, tiles, renders and tokenizes.

    Args:
        model: which checkpoint's description to follow; its weights are not read.
        images: what pictures are accepted.
    """

    def __init__(self, model: ModelOptions, images: ImageOptions) -> None:
        spec = open_checkpoint(model.model, model.model_base, model.vision_tower, model.conv_mode, weights=False)
        self._processor = Processor(spec, images)
        # One request at a time: a replica is a core, and holds one decoded picture. The tier scales by replicas.
        self._thread = ThreadPoolExecutor(1, "prepare")
        self._metrics = PreprocessorMetrics()

    async def prepare(self, messages: Sequence[Message], conv_mode: str | None, deadline: float) -> PreparedPrompt:
        """One prompt as model input.

        Raises:
            RequestError: the input is at fault; the class says how.
            DeadlineExceededError: the time was up before the work was done.
        """
        left = False

        def check() -> None:
            check_deadline(deadline)
            if left:
                raise DeadlineExceededError("Nobody waits for the answer.")

        def work() -> PreparedPrompt:
            check()
            start = time.perf_counter()
            prepared = self._processor.prepare(messages, conv_mode=conv_mode, check=check)
            self._metrics.prepared(prepared, time.perf_counter() - start)
            return prepared

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            left = True
