"""The strict check of a Serve config: `python -m deployments.tools.check_config serve_config.yaml`.

Ray drops unknown keys, to be forward compatible, so that a typo silently becomes a default. Here Ray or the application
must know every key, and all replicas must fit the CPUs that the file is meant for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from llava_serve.app_options import ENGINE_VARIABLE, LIVE_OPTIONS, changed_options, replica_engine
from llava_serve.cli.serve_config import (
    engine_variable,
    faults_of,
    models_of,
    unknown,
    unknown_keys,
    wrong_values,
)
from llava_serve.config import EngineOptions, RoutingOptions
from llava_serve.errors import RequestError
from llava_serve.ray_application import NAMES

from ..app import DEPLOYMENTS, AppArgs
from ..autoscaling import WorkPolicy
from ..model import LlavaModel
from ..router import most_requests
from .config import IMPORT_PATHS

ROUTERS = tuple(f"{name}.router:AffinityRouter" for name in NAMES)
POLICIES = tuple(f"{name}.autoscaling:WorkPolicy" for name in NAMES)


def main(argv: list[str] | None = None) -> int:
    """Prints each fault on one line; the exit status is 1 if there is one."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.check_config", description="Check a Serve config.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--cpus", type=float, help="also check that all replicas fit this many CPUs")
    options = parser.parse_args(argv)
    try:
        config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        print(f"{options.config}: not readable as YAML: {error}", file=sys.stderr)
        return 1
    faults = check(config, cpus=options.cpus)
    for fault in faults:
        print(f"{options.config}: {fault}", file=sys.stderr)
    return 1 if faults else 0


def check(config: object, *, cpus: float | None = None) -> list[str]:
    """Returns a sentence per fault: its place, and the name that was probably meant.

    Args:
        config: the parsed YAML.
        cpus: the CPUs that all replicas must fit at the maximum of autoscaling; None does not check.
    """
    if faults := faults_of(config, ServeDeploySchema, ""):
        return faults
    assert isinstance(config, Mapping)
    for number, application in enumerate(config["applications"]):
        for index, deployment in enumerate(deployments_of(application)):
            faults += check_values(deployment, f"applications[{number}].deployments[{index}].")
        if application["import_path"] in IMPORT_PATHS:
            faults += check_application(application, f"applications[{number}].")
    if cpus is not None and not faults:
        needed = sum(
            cpus_at_most(each) for application in config["applications"] for each in deployments_of(application)
        )
        if needed > cpus:
            faults.append(f"the replicas need up to {needed:g} CPUs, and there are {cpus:g}")
    return faults


def check_application(application: Mapping[str, Any], path: str) -> Iterator[str]:
    """Checks what Ray cannot: the application's arguments and the names of its deployments."""
    arguments = application.get("args", {})
    faults = faults_of(arguments, AppArgs, f"{path}args.")
    yield from faults
    named = [deployment["name"] for deployment in deployments_of(application)]
    for number, name in enumerate(named):
        if name not in DEPLOYMENTS:
            yield unknown(f"{path}deployments[{number}].name: {name}", name, DEPLOYMENTS)
        elif not faults:
            given = AppArgs(**arguments)
            yield from check_user_config(
                deployments_of(application)[number], given, f"{path}deployments[{number}].user_config"
            )
            yield from check_engine(deployments_of(application)[number], given, f"{path}deployments[{number}].")
        yield from check_routing(deployments_of(application)[number], f"{path}deployments[{number}].")
        yield from check_policy(deployments_of(application)[number], f"{path}deployments[{number}].")
        yield from check_gpus(deployments_of(application)[number], f"{path}deployments[{number}].")
    for name in DEPLOYMENTS:
        if name not in named:
            yield f"{path}deployments: {name} is missing; Serve would reserve a whole CPU for it"


def check_values(deployment: Mapping[str, Any], path: str) -> Iterator[str]:
    """Checks what Serve's schema does not: where it says `Dict | Model`, it accepts any dict."""
    for name, value in deployment.items():
        if isinstance(value, Mapping):
            for model in models_of(DeploymentSchema.model_fields[name].annotation):
                yield from wrong_values(value, model, f"{path}{name}.")


def check_user_config(deployment: Mapping[str, Any], arguments: AppArgs, path: str) -> Iterator[str]:
    """Checks what a running replica would refuse, with no more than a line in its log."""
    options = getattr(arguments, LIVE_OPTIONS[deployment["name"]].section)
    given = deployment.get("user_config")
    if faults := list(unknown_keys(given, type(options), f"{path}.")):
        yield from faults
        return
    try:
        changed_options(deployment["name"], options, given)
    except RequestError as error:
        yield f"{path}: {error}"


def check_engine(deployment: Mapping[str, Any], arguments: AppArgs, path: str) -> Iterator[str]:
    """Checks the engine options in the environment of replicas."""
    said = engine_variable(deployment)
    variables = f"{path}ray_actor_options.runtime_env.env_vars."
    if said is not None and deployment["name"] != LlavaModel.__name__:
        yield f"{variables}{ENGINE_VARIABLE}: only {LlavaModel.__name__} has an engine"
    try:
        yield from check_room(deployment, replica_engine(arguments.engine, said), path)
    except RequestError as error:
        yield f"{variables}{error}"


def check_room(deployment: Mapping[str, Any], engine: EngineOptions, path: str) -> Iterator[str]:
    """Checks that a replica gets enough requests for its batch, and has room for other calls beside them."""
    routing = deployment.get("request_router_config") or {}
    if routing.get("request_router_class") not in ROUTERS:
        return
    given = (routing.get("request_router_kwargs") or {}).get("max_per_replica")
    most = given if isinstance(given, int) else most_requests(engine)
    if most < engine.max_num_seqs:
        yield (
            f"{path}request_router_config.request_router_kwargs.max_per_replica: {most}; a replica's batch has "
            f"{engine.max_num_seqs}: leave it out, and each replica says what it takes"
        )
    allowed = deployment.get("max_ongoing_requests")
    if allowed is not None and allowed <= most:
        yield (
            f"{path}max_ongoing_requests: {allowed}; a replica gets {most} requests, and beside them health checks and "
            "aborts would wait: set more"
        )


def check_routing(deployment: Mapping[str, Any], path: str) -> Iterator[str]:
    """Checks what Serve would find only in the replicas, where every call then waits for ever."""
    routing = deployment.get("request_router_config") or {}
    if routing.get("request_router_class") in ROUTERS:
        arguments = routing.get("request_router_kwargs") or {}
        path += "request_router_config.request_router_kwargs."
        yield from faults_of(arguments, RoutingOptions, path)


def check_policy(deployment: Mapping[str, Any], path: str) -> Iterator[str]:
    """Checks what Serve would find only in its controller."""
    policy = (deployment.get("autoscaling_config") or {}).get("policy") or {}
    if policy.get("policy_function") not in POLICIES:
        return
    arguments, path = policy.get("policy_kwargs") or {}, f"{path}autoscaling_config.policy.policy_kwargs"
    names = signature(WorkPolicy).parameters
    faults = [unknown(f"{path}.{name}", name, names) for name in arguments if name not in names]
    faults += [f"{path}.{name}: missing" for name in names if name not in arguments]
    yield from faults
    if not faults:
        try:
            WorkPolicy(**arguments)
        except (TypeError, ValueError):
            yield f"{path}.target_wait_s: must be a positive number of seconds"


def check_gpus(deployment: Mapping[str, Any], path: str) -> Iterator[str]:
    """Checks that no replica reserves GPUs that it would not use."""
    gpus = (deployment.get("ray_actor_options") or {}).get("num_gpus") or 0
    if gpus > 1:
        yield (
            f"{path}ray_actor_options.num_gpus: {gpus:g}; a replica runs its model on one GPU, so more would lie idle: "
            "set 1, and more replicas"
        )


def deployments_of(application: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The deployments of an application in the config."""
    return application.get("deployments") or []


def cpus_at_most(deployment: Mapping[str, Any]) -> float:
    """The CPUs of a deployment at its largest number of replicas."""
    replicas = deployment.get("num_replicas", 1)
    if scaling := deployment.get("autoscaling_config"):
        replicas = scaling.get("max_replicas", 1)
    elif replicas == "auto":
        replicas = 100  # Serve's own maximum
    return float(replicas) * float((deployment.get("ray_actor_options") or {}).get("num_cpus", 1))


if __name__ == "__main__":
    sys.exit(main())
