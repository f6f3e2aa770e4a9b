"""The application with more endpoints: `GET /remaining` counts what remains of all requests, in every tier,
`GET /engine` has the engine's statistics, and with `GET /hang` the engine's next step does not return.

One replica per tier; all tiers are the real ones.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `build_app` as it stands.

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.app import AppArgs
from deployments.ingress import Ingress
from deployments.model import LlavaModel
from deployments.preprocessor import ImagePreprocessor
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port
from llava_serve.config import ApiOptions

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"


def counted_config(**api: Any) -> dict[str, Any]:
    """`serve_config.yaml` with the endpoints, on a free port, and one replica per tier, so that they count everything.

    Args:
        api: changed options of the ingress.
    """
    config = read_config(CONFIG, port=free_port())
    (application,) = config["applications"]
    application["import_path"] = "testbed.counted:build_app"
    application["args"]["api"].update(api)
    for deployment in application["deployments"]:
        deployment.pop("autoscaling_config", None)
    return config


async def other_tasks() -> list[str]:
    """The tasks of the replica's event loop by the names of their coroutines, but for the one that asks."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return sorted(getattr(task.get_coro(), "__qualname__", "") for task in others)


class CountedPreprocessor(ImagePreprocessor):
    """The real picture tier, and its tasks."""

    async def tasks(self) -> list[str]:
        return await other_tasks()


class CountedModel(LlavaModel):
    """The real model tier, its tasks, and an engine that can hang."""

    async def tasks(self) -> list[str]:
        return await other_tasks()

    async def hang(self) -> None:
        """From now on a step of the engine does not return, as with a kernel that hangs."""
        self._llm._loop.engine.step = threading.Event().wait  # type: ignore[method-assign,assignment]


class CountedIngress(Ingress):
    """The real ingress, with the endpoints."""

    def __init__(
        self, model_name: str, options: ApiOptions, preprocessor: DeploymentHandle, model: DeploymentHandle
    ) -> None:
        super().__init__(model_name, options, preprocessor, model)
        self._preprocessor = preprocessor
        self._model = model

    def __serve_build_asgi_app__(self) -> ASGIApp:  # type: ignore[override]  # Serve takes any
        app = FastAPI()
        app.add_api_route("/remaining", self.remaining)
        app.add_api_route("/engine", self.engine)
        app.add_api_route("/hang", self.hang)
        app.mount("/", super().__serve_build_asgi_app__())
        return app

    async def engine(self) -> Mapping[str, Any]:
        """The engine's stats."""
        stats: dict[str, Any] = await self._model.stats.remote()
        return stats

    async def hang(self) -> None:
        """Lets the engine hang."""
        await self._model.hang.remote()

    async def remaining(self) -> Mapping[str, int | list[str]]:
        """Sequences and blocks of the engine, and tasks of the replicas; an idle replica has some tasks, too."""
        stats = await self.engine()
        return {
            "sequences": stats["running"] + stats["waiting"],
            "blocks": stats["total_blocks"] - stats["free_blocks"],
            "tasks_ingress": await other_tasks(),
            "tasks_picture_tier": await self._preprocessor.tasks.remote(),
            "tasks_model": await self._model.tasks.remote(),
        }


def build_app(args: AppArgs) -> Application:
    """As `deployments.app.build_app`, with the counted parts under the real ones' names."""
    preprocessor = serve.deployment(CountedPreprocessor, name="ImagePreprocessor").bind(args.model_options, args.images)
    model = serve.deployment(CountedModel, name="LlavaModel").bind(args.model_options, args.engine)
    ingress = serve.deployment(serve.ingress()(CountedIngress), name="Ingress")
    return ingress.bind(args.model_name, args.api, preprocessor, model)
