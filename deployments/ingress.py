"""The front door: the library's own web app, and the same house for other Ray jobs, over handles to the other tiers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ray.serve.handle import DeploymentHandle

from deployments.aborts import AbortedCalls
from deployments.backend import HandleBackend
from deployments.drain import DrainGate
from llava_serve.api.admission import House, demand_size
from llava_serve.api.app import create_app
from llava_serve.api.chat import demand_complete
from llava_serve.api.completion import Tally
from llava_serve.api.errors import error_body
from llava_serve.api.front import log_if_internal
from llava_serve.config import ApiOptions
from llava_serve.errors import LlavaServeError
from llava_serve.types import Chunk, Message, PreparedPrompt, SamplingParams


class Ingress:
    """Admission, access and the OpenAI API; `generate` is the door for other Ray jobs.

    Args:
        model_name: the name that requests use for the model.
        options: access and limits.
        preprocessor: handle to `ImagePreprocessor`.
        model: handle to `LlavaModel`.
    """

    def __init__(
        self, model_name: str, options: ApiOptions, preprocessor: DeploymentHandle, model: DeploymentHandle
    ) -> None:
        self._options = options
        self._backend = HandleBackend(model_name, preprocessor, model)
        self._house = House(options.max_queue)
        self._aborted = AbortedCalls()

    def __serve_build_asgi_app__(self) -> DrainGate:
        """Called by Serve in the replica, after the constructor."""
        self._gate = DrainGate(create_app(self._backend, self._options, self._house))
        return self._gate

    async def generate(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        conv_mode: str | None,
        call_id: str,
        deadline: float,
    ) -> AsyncGenerator[PreparedPrompt | list[Chunk]]:
        """Yields the prompt without its tiles, then the answer in groups. `LlavaClient` is the caller's side of it.

        Admission, the longest time and draining are those of HTTP requests; keys are not asked for, since whoever calls
        has passed Ray's own door.

        Args:
            messages: pictures as encoded bytes or `data:` URLs.
            sampling: how the answer is drawn.
            conv_mode: overrides the checkpoint's template.
            call_id: of this call alone; `abort` knows it by that.
            deadline: seconds since the epoch.

        Raises:
            LlavaServeError: the class says what is wrong; the root itself is a fault of ours, which the log tells of.
        """
        try:
            with self._gate.guest(), self._house.guest():
                demand_size(messages, self._options.max_body_bytes)
                deadline = min(deadline, time.time() + self._options.max_timeout_s)
                if call_id in self._aborted:
                    return
                prepared = await self._backend.prepare(messages, conv_mode=conv_mode, deadline=deadline)
                if call_id in self._aborted:
                    return
                yield dataclasses.replace(prepared, tiles=())
                tally = Tally(prepared, sampling.n)
                answer = self._backend.groups(prepared, sampling, request_id=call_id, deadline=deadline)
                async with aclosing(answer) as groups:
                    async for group in groups:
                        if call_id in self._aborted:
                            return
                        for chunk in group:
                            tally.add(chunk)
                        yield group
                demand_complete(tally)
        except LlavaServeError:
            raise
        except Exception as error:
            log_if_internal(error, call_id)
            raise LlavaServeError(error_body(error, call_id)["error"]["message"]) from None

    async def abort(self, call_ids: Sequence[str]) -> None:
        """Ends calls of `generate` whose caller has left, at their next step. Those of other replicas are no error."""
        self._aborted.add(call_ids)

    async def drain(self) -> None:
        """Refuses new requests from now on, and returns when the last one in the house has its answer."""
        await self._gate.drain()
