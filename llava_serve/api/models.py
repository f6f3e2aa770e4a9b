"""The served model: its names, and its entries in `/v1/models`."""

from __future__ import annotations

import time
from typing import Literal

from llava_serve.api.backends import Backend
from llava_serve.api.protocol import Answer
from llava_serve.checkpoints.model_name import short_name
from llava_serve.config import ApiOptions
from llava_serve.errors import UnknownModelError, shown


class ImageLimits(Answer):
    """Limits of the images of a request."""

    max_per_request: int
    max_bytes: int
    max_pixels: int


class Model(Answer):
    """An entry of `/v1/models`: each name of the model has one.

    Attributes:
        root: the model's own name.
        aliases: its other names.
        max_model_len: positions of the context: the prompt and its answer.
        default_max_tokens: the longest answer to a request that sets none; null is to the end of the context.
        max_tokens: the longest answer to any request, behind a prompt of one token.
        images: of a request.
        generation_config: the sampling defaults of the checkpoint's `generation_config.json` are not applied.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    aliases: list[str]
    max_model_len: int
    default_max_tokens: int | None
    max_tokens: int
    images: ImageLimits
    generation_config: Literal["ignored"]


class ModelList(Answer):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]


class ServedModel:
    """The one model of a server, under all its names."""

    def __init__(self, backend: Backend, options: ApiOptions) -> None:
        self.name = backend.model_name
        self._backend = backend
        self._options = options
        self._created = int(time.time())
        self._listed = tuple(dict.fromkeys((self.name, *options.aliases)))
        self._names = {*self._listed, short_name(self.name)}

    def check(self, name: str | None) -> None:
        """Raises `UnknownModelError` for a name that is not the model's; a request may leave it out, or empty."""
        if name and name not in self._names:
            raise UnknownModelError(
                f"The model '{shown(name)}' does not exist here; this server has '{self.name}'.", "model"
            )

    async def entries(self) -> list[Model]:
        """One for each name that is listed."""
        described = await self._backend.describe()
        images = ImageLimits(
            max_per_request=described.max_images,
            max_bytes=described.max_image_bytes,
            max_pixels=described.max_image_pixels,
        )
        return [
            Model(
                id=name,
                object="model",
                created=self._created,
                owned_by="llava-serve",
                root=self.name,
                aliases=[each for each in self._listed if each != self.name],
                max_model_len=described.max_model_len,
                default_max_tokens=self._options.default_max_tokens,
                max_tokens=described.max_model_len - 1,
                images=images,
                generation_config="ignored",
            )
            for name in self._listed
        ]
