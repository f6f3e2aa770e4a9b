"""Plain rows, of JSONL or CSV: an id, images and a question in; the id and the answer, or an error, out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_serve.api.errors import wire_error
from llava_serve.batch.forms import LineError, Result, Written, fields_of, image_source, version_of
from llava_serve.batch.input_file import Item
from llava_serve.batch.job import BatchJob
from llava_serve.errors import LlavaServeError
from llava_serve.inputs import Prompt
from llava_serve.sampling_params import SamplingParams, with_original_temperature

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_new_tokens",
    "max_tokens",
    "min_tokens",
    "stop",
    "seed",
    "num_beams",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
FIELDS = ("id", "image", "question", "conv_mode", *SAMPLING_FIELDS)


class PlainForm:
    """Rows of JSONL and CSV."""

    id_field = "id"

    def __init__(self, job: BatchJob) -> None:
        self._job = job

    def prompt(self, item: Item) -> Prompt:
        """As `Form` says."""
        fields = fields_of(item, *FIELDS)
        question, images, conv_mode = fields.get("question"), fields.get("image", []), fields.get("conv_mode")
        if not isinstance(question, str) or not question.strip():
            raise LineError(item, "'question' must be a text, and not empty")
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(each, str) and each for each in images):
            raise LineError(item, "'image' must be a path, a link, or a list of them")
        if not isinstance(conv_mode, str | None):
            raise LineError(item, "'conv_mode' must be the name of a template")
        if {"max_tokens", "max_new_tokens"} <= fields.keys():
            raise LineError(item, "'max_tokens' and 'max_new_tokens' mean the same; give one of them")
        sources = [image_source(each, self._job.input.parent) for each in images]
        return Prompt(question, sources, self._sampling(fields), conv_mode)

    def line(self, item: Item, result: Result) -> dict[str, Any]:
        """As `Form` says."""
        known = {"id": (item.fields or {}).get("id")}
        version = {"version": version_of(self._job, item)}
        if isinstance(result, LlavaServeError):
            return known | {"error": result.message, "code": wire_error(result).code} | version
        usage = {
            "prompt_tokens": result.num_prompt_tokens,
            "image_tokens": result.num_image_tokens,
            "completion_tokens": len(result.token_ids),
        }
        return known | {"answer": result.text, "finish_reason": result.finish_reason, "usage": usage} | version

    def written(self, line: Mapping[str, Any]) -> Written | None:
        """As `Form` says."""
        if "id" not in line or not isinstance(line.get("version"), str) or not line.keys() & {"answer", "error"}:
            return None
        return Written(None if line["id"] is None else str(line["id"]), line["version"], "error" in line)

    def _sampling(self, fields: Mapping[str, Any]) -> SamplingParams:
        given = {name: fields[name] for name in SAMPLING_FIELDS if name in fields}
        if isinstance(given.get("stop"), str | list):
            given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
        if "max_tokens" in given:
            given["max_new_tokens"] = given.pop("max_tokens")
        return SamplingParams(**with_original_temperature({**self._job.sampling, **given}))
