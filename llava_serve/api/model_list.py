"""`GET /v1/models`."""

from __future__ import annotations

from fastapi import APIRouter

from llava_serve.api.models import Model, ModelList
from llava_serve.api.service import Service


def model_routes(service: Service) -> APIRouter:
    """`/v1/models`, and each model in it."""
    routes, served = APIRouter(), service.model

    @routes.get("/v1/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(object="list", data=await served.entries())

    @routes.get("/v1/models/{name:path}", summary="Describe a model")
    async def one_model(name: str) -> Model:
        served.check(name)
        entries = await served.entries()
        return next((entry for entry in entries if entry.id == name), entries[0])

    return routes
