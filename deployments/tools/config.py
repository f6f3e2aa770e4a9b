"""Serve configs, of a file or the packaged one: changed by flags, and checked. Only the strict check imports ray."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError

from llava_serve.api.keys import accepted_keys
from llava_serve.checkpoints import open_checkpoint
from llava_serve.cli.ports import bound_socket, check_open
from llava_serve.cli.serve_config import address_of, effective_arguments, parse_serve_config, read_serve_config
from llava_serve.config import ApiOptions, EngineOptions, ModelOptions
from llava_serve.errors import CheckpointError, RequestError
from llava_serve.ray_application import NAMES, is_application

from .. import PACKAGE

CONFIG, PROFILE = "serve_config.yaml", "production.env"
"""The files that ship. They lie at the top of the repository; the package has links to them, and the wheel copies."""

IMPORT_PATHS = tuple(f"{name}.app:build_app" for name in NAMES)
"""Of the application, by either name of its package."""


class ConfigError(Exception):
    """The config cannot be used; the message is for the terminal."""


class Changes(TypedDict, total=False):
    """What replaces the config's own values; None leaves them.

    Attributes:
        host: that HTTP listens on.
        port: that HTTP listens on.
        model: `builtin`, a folder, or a hub id in the local cache.
        api_keys_file: a file of API keys, one a line.
    """

    host: str | None
    port: int | None
    model: str | None
    api_keys_file: str | None


def packaged(name: str, package: str = PACKAGE) -> str:
    """The text of `CONFIG` or `PROFILE`. Its import paths say `deployments`; here they name `package`."""
    text = (files(PACKAGE) / name).read_text(encoding="utf-8")
    return re.sub(r"\bdeployments(?=\.[a-z])", package, text)


def read_config(path: Path | None = None, **changes: Unpack[Changes]) -> dict[str, Any]:
    """A config with the changes, after the strict check.

    Raises:
        ConfigError: as `parse_config` and `check_strictly`.
    """
    config = parse_config(path, **changes)
    check_strictly(config, path)
    return config


def parse_config(path: Path | None = None, **changes: Unpack[Changes]) -> dict[str, Any]:
    """A config with the changes. Quick: it imports neither ray nor torch.

    Args:
        path: None takes the packaged one.
        changes: what replaces its own values.

    Raises:
        ConfigError: it is no config; or its application, its model or its file of API keys is not there.
    """
    try:
        config = parse_serve_config(packaged(CONFIG)) if path is None else read_serve_config(path)
    except RequestError as error:
        raise ConfigError(str(error)) from None
    config.setdefault("http_options", {}).update(_given(changes, "host", "port"))
    arguments = config["applications"][0].setdefault("args", {})
    if model := changes.get("model"):
        arguments.pop("probe", None)  # of the config's own model
        arguments["model"] = str(Path(model).absolute()) if model != "builtin" and Path(model).is_dir() else model
    if keys := changes.get("api_keys_file"):
        arguments.setdefault("api", {})["api_keys_file"] = str(Path(keys).absolute())
        for deployment in config["applications"][0].get("deployments") or ():
            (deployment.get("user_config") or {}).pop("api_keys_file", None)
    for application in config["applications"]:
        _check_application(application, path)
    return config


def check_address(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if the config's port is in use, or is none; or if everyone in the network were let in."""
    host, port = address_of(config)
    if not isinstance(host, str) or not isinstance(port, int):
        return  # the strict check says so
    try:
        bound_socket(host, port).close()
        for application in config["applications"]:
            if application.get("import_path") in IMPORT_PATHS:
                keys = accepted_keys(ApiOptions.model_validate(effective_arguments(application).get("api", {})))
                check_open(host, has_keys=keys is not None)
    except ValidationError:
        return  # the same
    except RequestError as error:
        raise ConfigError(str(error)) from None


def check_strictly(config: Mapping[str, Any], path: Path | None = None) -> None:
    """Raises `ConfigError` with a sentence for each value that Ray or the application does not know. Imports ray."""
    from .check_config import check

    if faults := check(config):
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))


def _check_application(application: Mapping[str, Any], path: Path | None) -> None:
    """Raises `ConfigError` if what the application needs is not here."""
    import_path = str(application.get("import_path", ""))
    package = import_path.partition(".")[0]
    if package in NAMES and not is_application(package):
        raise ConfigError(f"{path}: {import_path}: this installation has the application as {PACKAGE}.app:build_app.")
    if import_path not in IMPORT_PATHS:
        return
    try:
        arguments = effective_arguments(application)
        named = {name: arguments[name] for name in ModelOptions.model_fields if name in arguments}
        model = ModelOptions(**named)
        api = ApiOptions(**arguments.get("api", {}))
        engine = EngineOptions(**arguments.get("engine", {}))
    except (TypeError, RequestError):
        return  # the strict check says where
    try:
        spec = open_checkpoint(model)
        spec.limited_to(engine.max_model_len)
        accepted_keys(api)
    except (CheckpointError, RequestError) as error:
        raise ConfigError(str(error)) from None


def _given(changes: Changes, *names: str) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name in names and value is not None}
