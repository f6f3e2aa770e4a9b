"""Serve configs, as both ways to serve read them: on Ray, and in one process. Imports no ray."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llava_serve.app_options import ENGINE_VARIABLE, LIVE_OPTIONS, AppOptions, engine_changes
from llava_serve.errors import RequestError
from llava_serve.faults import faults, option_path, rule_of


def read_serve_config(path: Path) -> dict[str, Any]:
    """The config in a file.

    Raises:
        RequestError: it cannot be read, or is no Serve config with an application.
    """
    try:
        return parse_serve_config(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} cannot be read: it is not UTF-8.") from None


def parse_serve_config(text: str, name: str = "The config") -> dict[str, Any]:
    """As `read_serve_config`."""
    try:
        config: dict[str, Any] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place is not None else ""
        raise RequestError(f"{name} cannot be read{line}: it is not valid YAML.") from None
    if not _has_an_application(config):
        raise RequestError(f"{name} is not a Serve config with an application.")
    return config


def address_of(config: Mapping[str, Any]) -> tuple[str, int]:
    """The host and the port of HTTP; Serve's defaults where the config says none."""
    http = config.get("http_options", {})
    return http.get("host", "0.0.0.0"), http.get("port", 8000)


def app_options(config: Mapping[str, Any], path: str, changes: Mapping[str, Any]) -> AppOptions:
    """The options of a config's one application, as one process uses them.

    Args:
        path: of the config.
        changes: options that replace the config's; those of `engine` and `api` each by itself. Another model has no
            probe.

    Raises:
        RequestError: there are several applications; an option is unknown or has a wrong value.
    """
    if len(config["applications"]) > 1:
        raise RequestError(f"{path} has several applications; --in-process serves one.")
    arguments = effective_arguments(config["applications"][0])
    if "model" in changes:
        arguments.pop("probe", None)  # of the config's own model
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(arguments.get(name), Mapping)
        arguments = arguments | {name: {**arguments[name], **value} if both else value}
    if faults := faults_of(arguments, AppOptions, "applications[0].args."):
        raise RequestError("\n".join(f"{path}: {fault}" for fault in faults))
    return AppOptions(**arguments)


def effective_arguments(application: Mapping[str, Any]) -> dict[str, Any]:
    """The `args` of an application, with the `user_config` of each deployment in the section that it changes, and the
    engine options in the environment of model replicas.

    Raises:
        RequestError: those options cannot be used.
    """
    arguments = dict(application.get("args", {}))
    for deployment in application.get("deployments") or ():
        if (said := engine_variable(deployment)) is not None:
            arguments["engine"] = {**arguments.get("engine", {}), **engine_changes(said)}
        live = LIVE_OPTIONS.get(deployment.get("name"))
        given = deployment.get("user_config")
        if live is not None and isinstance(given, Mapping):
            arguments[live.section] = {**arguments.get(live.section, {}), **given}
    return arguments


def engine_variable(deployment: Mapping[str, Any]) -> Any:
    """What the replicas of a deployment have as `ENGINE_VARIABLE`."""
    value: Any = deployment
    for key in ("ray_actor_options", "runtime_env", "env_vars", ENGINE_VARIABLE):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def faults_of(value: object, model: type[BaseModel], path: str) -> list[str]:
    """A sentence per key that the model does not know, else per value that it rejects."""
    return list(unknown_keys(value, model, path)) or wrong_values(value, model, path)


def unknown_keys(value: object, schema: object, path: str) -> Iterator[str]:
    """Walks a value and its type, and reports the keys that no model in the type has."""
    # Not pydantic's extra="forbid": that accepts any key where the schema says `Dict | Model`, and suggests no names.
    models = list(models_of(schema))
    if isinstance(value, Mapping) and models:
        for key, below in value.items():
            fields = [model.model_fields[key] for model in models if key in model.model_fields]
            if fields:
                yield from unknown_keys(below, fields[0].annotation, f"{path}{key}.")
            else:
                yield unknown(f"{path}{key}", str(key), [name for model in models for name in model.model_fields])
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_keys(item, schema, f"{path.removesuffix('.')}[{number}].")


def models_of(schema: object) -> Iterator[type[BaseModel]]:
    """The models in a type, such as the one in `Optional[list[Model]]`."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        yield schema
    for part in typing.get_args(schema):
        yield from models_of(part)


def unknown(where: str, got: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f"{where}: unknown" + (f"; did you mean {near[0]}?" if near else "")


def wrong_values(value: object, model: type[BaseModel], path: str) -> list[str]:
    """A sentence per value that the model rejects."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        return [f"{path}{option_path(fault['loc'])}: {rule_of(fault)}" for fault in faults(error)]
    return []


def _has_an_application(config: Any) -> bool:
    """Whether the parts are there that flags change."""
    if not isinstance(config, dict) or not isinstance(config.get("http_options", {}), dict):
        return False
    applications = config.get("applications")
    return isinstance(applications, list) and bool(applications) and all(map(_is_application, applications))


def _is_application(value: Any) -> bool:
    arguments = value.get("args", {}) if isinstance(value, dict) else None
    return isinstance(arguments, dict) and isinstance(arguments.get("api", {}), dict)
