"""What a batch job is: its files, its model and how it samples."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import Field

from llava_serve.checkpoints.model_name import model_name
from llava_serve.config import ModelOptions
from llava_serve.options import Options


class BatchJob(Options):
    """The options of a job.

    Attributes:
        input: the questions: an OpenAI batch file, JSONL or CSV.
        output: where the answers are written, a JSON object a line.
        model: that answers.
        sampling: fields of `SamplingParams` that a row replaces by its own. Not for OpenAI batch files.
    """

    input: Path
    output: Path
    model: ModelOptions = ModelOptions()
    sampling: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """The name of the model, as a server has it."""
        return model_name(self.model.model)

    @property
    def settings(self) -> str:
        """A short digest of all options that change answers. The device is none of them: a job may go on elsewhere."""
        model = self.model.model_dump(exclude={"device"})
        folders = {name: value and model_name(value) for name, value in model.items() if name in _FOLDERS}
        return digest([model | folders, dict(self.sampling)], size=4)


_FOLDERS = ("model", "model_base", "vision_tower")
"""Which may lie elsewhere on another machine."""


def digest(value: Any, size: int = 12) -> str:
    """A digest of a JSON value, in hexadecimal digits."""
    return blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()
