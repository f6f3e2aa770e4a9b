"""The picture tier: CPU replicas that turn messages into model input. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import ray
from ray.serve.handle import DeploymentHandle

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.processor import Processor
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, PreparedPrompt

from .handle_calls import returns_failure
from .live_config import LiveConfig
from .metrics import RayExporter
from .model_gate import wait_for_model
from .replica import begin_replica
from .work import ImageWork


class ImagePreprocessor:
    """Decodes, tiles, renders and tokenizes.

    Args:
        model: which checkpoint's description to follow; its weights are not read.
        images: limits of the images; `reconfigure` changes them. Images are decoded in child processes, which can be
            ended.
        max_model_len: as in `EngineOptions`.
        model_tier: handle to `LlavaModel`. None does not wait for it.
    """

    def __init__(
        self,
        model: ModelOptions,
        images: ImageOptions,
        max_model_len: int | None = None,
        model_tier: DeploymentHandle | None = None,
    ) -> None:
        begin_replica()
        spec = open_checkpoint(model, weights=False)
        self._spec = spec.limited_to(max_model_len)
        self._prompt_key = model.prompt_key
        self._model_tier = model_tier
        self._exporter = RayExporter(self._spec.name)
        self._num_threads = _num_cpus()
        self._work = ImageWork(self._num_threads)
        self._live = LiveConfig("ImagePreprocessor", images, self._apply)
        self._apply(images)

    async def reconfigure(self, user_config: Mapping[str, object] | None, rank: object) -> None:
        """Called by Serve with the deployment's `user_config`. Requests in flight keep the limits of their arrival."""
        await self._live.change(user_config)
        if self._model_tier is not None:
            await wait_for_model(self._model_tier, self._prompt_key)
            self._model_tier = None  # it waits at the start alone

    def _apply(self, images: ImageOptions) -> None:
        """Replaces the processor. The one before it ends its processes when its last request has ended, and with it
        the last reference to it."""
        processor = Processor(self._spec, images.isolated)
        processor.metrics.export_to(self._exporter)
        # As many requests at once as the replica has cores: each holds one decoded image, in a process of its own.
        self._processor = ThreadedProcessor(processor, self._num_threads)

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
        with self._work.queued(asked) as size:
            prepared = await self._processor.prepare(
                lambda: asked, conv_mode=conv_mode, deadline=deadline, cache_salt=cache_salt, priority=priority
            )
            self._work.done(size, prepared)
        return dataclasses.replace(prepared, prompt_key=self._prompt_key)

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

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """Called by Serve at intervals: `autoscaling.Figures`, in megapixels."""
        return dataclasses.asdict(self._work.figures())


def _num_cpus() -> int:
    """The cores that Serve has given to this replica; a part of one is one."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return 1
    cpus: float = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, math.ceil(cpus))
