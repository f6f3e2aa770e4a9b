"""The front door: the library's own web app, over handles to the other two tiers."""

from __future__ import annotations

from ray.serve.handle import DeploymentHandle

from deployments.backend import HandleBackend
from deployments.drain import DrainGate
from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions


class Ingress:
    """Admission, access and the OpenAI API.

    Args:
        model_name: the name that requests use for the model.
        options: access and limits of the web app.
        preprocessor: handle to `ImagePreprocessor`.
        model: handle to `LlavaModel`.
    """

    def __init__(
        self, model_name: str, options: ApiOptions, preprocessor: DeploymentHandle, model: DeploymentHandle
    ) -> None:
        self._options = options
        self._backend = HandleBackend(model_name, preprocessor, model)

    def __serve_build_asgi_app__(self) -> DrainGate:
        """Called by Serve in the replica, after the constructor."""
        self._gate = DrainGate(create_app(self._backend, self._options))
        return self._gate

    async def drain(self) -> None:
        """Refuses new requests from now on, and returns when the last one in the house has its answer."""
        await self._gate.drain()
