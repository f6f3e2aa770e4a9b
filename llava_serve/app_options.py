"""The options of a served application: its `args` in a Serve config, and those of them that change while it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ConfigDict, Field

from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import RequestError
from llava_serve.options import Options, SomeOptions, changed


class Probe(Options):
    """A question that a model must answer before it gets requests.

    Attributes:
        image: a file, `demo.png` for the one that ships, or a `data:` URL.
        question: about the image.
        expect: the answer contains this text, in upper or lower case.
    """

    image: str
    question: str
    expect: str = Field(min_length=1)


class AppOptions(ModelOptions):
    """The application's `args` in a Serve config: the model's options, and those of the other parts by name.

    Attributes:
        engine: limits of an engine.
        images: what pictures are accepted.
        api: access and limits of the web app.
        probe: asked of each new model replica; a wrong answer fails it before it gets a request.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # it may be a key

    engine: EngineOptions = EngineOptions()
    images: ImageOptions = ImageOptions()
    api: ApiOptions = ApiOptions()
    probe: tuple[Probe, ...] = ()

    @property
    def model_options(self) -> ModelOptions:
        """The options of the model alone."""
        return ModelOptions(**{name: getattr(self, name) for name in ModelOptions.model_fields})


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """What a deployment's `user_config` may hold.

    Attributes:
        section: of `args`; the names are those of its options.
        names: the options that change without a restart.
    """

    section: str
    names: frozenset[str]


LIVE_OPTIONS: Mapping[str, LiveOptions] = {
    "Ingress": LiveOptions("api", frozenset(ApiOptions.model_fields) - {"model_name", "api_keys"}),
    "ImagePreprocessor": LiveOptions("images", frozenset(ImageOptions.model_fields) - {"isolate"}),
    "LlavaModel": LiveOptions("engine", frozenset({"max_waiting"})),
}
"""By deployment. Keys never stand in a `user_config`, which Ray logs."""

ENGINE_VARIABLE = "LLAVA_ENGINE"
"""Environment variable of model replicas: engine options as JSON, which win over those of `args`. Ray replaces every
replica of an application whose `args` change, and those of one deployment when the environment of its replicas does."""


def changed_options(deployment: str, options: SomeOptions, user_config: Mapping[str, object] | None) -> SomeOptions:
    """The options of `args`, with those of a deployment's `user_config` instead; None changes nothing.

    Raises:
        RequestError: the `user_config` cannot be used; the message says why, without its values.
    """
    if user_config is None:
        return options
    live = LIVE_OPTIONS[deployment]
    if fixed := sorted(map(str, user_config.keys() - live.names)):
        able = ", ".join(sorted(live.names))
        raise RequestError(f"{fixed[0]} cannot change while the application runs; these can: {able}.")
    return changed(options, user_config)


def replica_engine(options: EngineOptions, said: str | None) -> EngineOptions:
    """The engine options of a replica: those of `args`, with those in the text of `ENGINE_VARIABLE` instead.

    Raises:
        RequestError: the text cannot be used.
    """
    given = engine_changes(said)
    try:
        return changed(options, given)
    except RequestError as error:
        raise RequestError(f"{ENGINE_VARIABLE}: {error}") from None


def engine_changes(said: str | None) -> dict[str, object]:
    """What the text of `ENGINE_VARIABLE` says; None says nothing.

    Raises:
        RequestError: it is no JSON object, or has what is not the model tier's alone.
    """
    try:
        given = json.loads(said or "{}")
    except (TypeError, ValueError):
        given = None
    if not isinstance(given, dict):
        raise RequestError(f"{ENGINE_VARIABLE}: it must be a text, a JSON object of engine options.")
    if "max_model_len" in given:
        raise RequestError(f"{ENGINE_VARIABLE}: max_model_len concerns the picture tier, too; set it in args.engine.")
    return given
