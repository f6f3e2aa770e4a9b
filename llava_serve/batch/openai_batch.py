"""OpenAI's batch files: requests for chat completions in, their responses out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_serve.api.completion import ChatShape
from llava_serve.api.errors import error_body, wire_error
from llava_serve.api.logprobs import ContentLogprobs
from llava_serve.api.protocol import ChatRequest, PromptTokensDetails, Usage
from llava_serve.api.validation import completion_id, conversation_of, parse_request, sampling_of
from llava_serve.batch.forms import LineError, Result, Written, fields_of, image_source, version_of
from llava_serve.batch.input_file import Item
from llava_serve.batch.job import BatchJob
from llava_serve.checkpoints.model_name import short_name
from llava_serve.config import ImageOptions
from llava_serve.errors import LlavaServeError, UnknownModelError, UnsupportedParameterError, shown
from llava_serve.images.fetch import read_local_source
from llava_serve.inputs import Prompt
from llava_serve.results import Completion, GenerationResult
from llava_serve.types import Chunk, Conversation, ImagePart, Message

URL = "/v1/chat/completions"
_PREFIX = "batch_req_"
_NOT_IN_A_BATCH = ("stream", "return_token_ids", "cache_salt")


class OpenAIForm:
    """Requests and responses of OpenAI's batch API."""

    id_field = "custom_id"

    def __init__(self, job: BatchJob) -> None:
        self._job = job

    def prompt(self, item: Item) -> Prompt:
        """As `Form` says."""
        wire = self._request(item)
        conversation, _ = conversation_of(wire, "images_first", "body.messages")
        return Prompt(
            partial(_with_images, conversation, self._job.input.parent),
            sampling=sampling_of(wire),
            conv_mode=wire.conv_mode,
            timeout=wire.timeout,
            priority=wire.priority or 0,
        )

    def line(self, item: Item, result: Result) -> dict[str, Any]:
        """As `Form` says. What a server would answer with a status is a response; what is no request is an error."""
        version = version_of(self._job, item)
        known = {"id": _PREFIX + version, "custom_id": (item.fields or {}).get("custom_id")}
        if isinstance(result, LineError):
            code = wire_error(result).code
            return known | {"response": None, "error": {"code": code, "message": result.message}}
        if isinstance(result, LlavaServeError):
            status, body = wire_error(result).status, error_body(result)
        else:
            status, body = 200, self._completion(item, result)
        return known | {"response": {"status_code": status, "request_id": version, "body": body}, "error": None}

    def written(self, line: Mapping[str, Any]) -> Written | None:
        """As `Form` says."""
        name, key, response = line.get("id"), line.get("custom_id"), line.get("response")
        if not isinstance(name, str) or not name.startswith(_PREFIX) or not isinstance(response, dict | None):
            return None
        failed = response is None or response.get("status_code") != 200
        return Written(None if key is None else str(key), name.removeprefix(_PREFIX), failed)

    def _request(self, item: Item) -> ChatRequest:
        """The request of an item.

        Raises:
            RequestError: it is none, or cannot be answered.
        """
        fields = fields_of(item, "custom_id", "method", "url", "body")
        if fields.get("method") != "POST":
            raise LineError(item, "'method' must be POST")
        if fields.get("url") != URL:
            raise LineError(item, f"'url' must be {URL}")
        if not isinstance(fields.get("body"), dict):
            raise LineError(item, "'body' must be an object")
        wire = parse_request(json.dumps(fields["body"]).encode(), ChatRequest)
        for name in _NOT_IN_A_BATCH:
            if getattr(wire, name):
                raise UnsupportedParameterError(f"'{name}' cannot be given in a batch; leave it out.", name)
        if wire.model not in (None, self._job.model_name, short_name(self._job.model_name)):
            raise UnknownModelError(
                f"The request is for the model '{shown(wire.model)}', and this job's is '{self._job.model_name}'.",
                "model",
            )
        completion_id(wire, "", "")
        return wire

    def _completion(self, item: Item, result: GenerationResult) -> dict[str, Any]:
        assert item.fields is not None
        wire = ChatRequest.model_construct(request_id=item.fields["body"].get("request_id"))
        tokens = sum(len(output.token_ids) for output in result.outputs)
        completion = ChatShape().completion(
            id=completion_id(wire, "chatcmpl-", version_of(self._job, item)),
            created=int(time.time()),
            model=self._job.model_name,
            choices=list(map(_choice, result.outputs)),
            usage=Usage(
                prompt_tokens=result.num_prompt_tokens,
                completion_tokens=tokens,
                total_tokens=result.num_prompt_tokens + tokens,
                prompt_tokens_details=PromptTokensDetails(
                    cached_tokens=result.num_cached_tokens, image_tokens=result.num_image_tokens
                ),
            ),
        )
        return completion.model_dump(mode="json", exclude_unset=True)


def _choice(output: Completion) -> Any:
    whole = Chunk(output.index, output.text, output.token_ids, output.finish_reason)
    return ChatShape().choice(whole, ContentLogprobs().push(output.text, output.logprobs, last=True))


def _with_images(conversation: Sequence[Message], folder: Path) -> Sequence[Message]:
    """A conversation with its images read."""

    def read(part: Any) -> Any:
        if not isinstance(part, ImagePart) or isinstance(part.source, bytes):
            return part
        return ImagePart(read_local_source(image_source(part.source, folder), ImageOptions()))

    messages = tuple(replace(message, parts=tuple(map(read, message.parts))) for message in conversation)
    return replace(conversation, messages=messages) if isinstance(conversation, Conversation) else messages
