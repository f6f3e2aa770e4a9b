"""Runs the vision tower, and holds the features of images. A picture that fails does so alone."""

from __future__ import annotations

import logging
from functools import partial

import torch

from llava_serve.engine.executor.attempt import attempt
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.scheduler import TileJob
from llava_serve.model.numerics import are_finite

_logger = logging.getLogger(__name__)


class ImageEncoder:
    """Features before the projector, [tiles, features, channels] by an image's digest."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.features: dict[str, torch.Tensor] = {}

    def encode(self, jobs: tuple[TileJob, ...], failures: dict[str, Exception]) -> tuple[list[str], list[torch.Tensor]]:
        """Runs the tower once over the tiles of all jobs. If that fails, runs it for each job by itself.

        Args:
            failures: by digest; those of jobs that fail by themselves are added, and the image's features dropped.

        Returns:
            For the check for NaN and infinity: digests of tiles, and bool [tiles] in parts: they are finite.
        """
        if not jobs:
            return [], []
        batch = attempt(partial(self._encode, jobs))
        if not isinstance(batch, Exception):
            return [job.digest for job in jobs for _ in job.tiles], [batch]
        digests: list[str] = []
        finite: list[torch.Tensor] = []
        for job in jobs:
            single = attempt(partial(self._encode, (job,)))
            if isinstance(single, Exception):
                failures.setdefault(job.digest, single)
                self.features.pop(job.digest, None)
            else:
                digests += [job.digest] * len(job.tiles)
                finite.append(single)
        if not failures:
            _logger.error("The images of a step could not be encoded as a batch, but one by one.", exc_info=batch)
        return digests, finite

    def _encode(self, jobs: tuple[TileJob, ...]) -> torch.Tensor:
        """Stores the features of all jobs' tiles. Returns bool [tiles]: they are finite."""
        tiles = torch.cat([torch.from_numpy(job.tiles) for job in jobs])
        features = self._model.tower_features(to_device(tiles, self._model.device))
        parts = torch.split_with_sizes(features, [len(job.tiles) for job in jobs])
        for job, part in zip(jobs, parts, strict=True):
            if job.first == 0:
                self.features[job.digest] = part.new_empty((job.total, *part.shape[1:]))
            self.features[job.digest][job.first : job.first + len(part)] = part
        return are_finite(features, (1, 2))
