"""The strict check of the Serve config: what ships passes, and a typo is refused wherever it stands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application

from deployments.app import DEPLOYMENTS, AppArgs, build_app
from deployments.router import most_requests
from deployments.tools.check_config import check
from llava_serve.app_options import ENGINE_VARIABLE
from llava_serve.config import BATCH_SHARE
from support.paths import CONFIG

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    parsed: Config = yaml.safe_load(CONFIG.read_text())
    return parsed


def application(config: Config) -> Config:
    first: Config = config["applications"][0]
    return first


def deployment(config: Config, name: str) -> Config:
    return next(each for each in application(config)["deployments"] if each["name"] == name)


def test_the_shipped_config_is_right_and_fits_two_cpus(config: Config) -> None:
    assert check(config, cpus=2) == []


def test_its_arguments_are_those_of_the_application(config: Config) -> None:
    args = AppArgs.model_validate(application(config)["args"])
    assert args.model == "builtin"
    assert args.engine.max_num_seqs == 32
    assert args.model_options.model == "builtin"
    assert args.model_name == "builtin"


def test_serve_sees_the_type_of_the_arguments() -> None:
    # A string here, as postponed annotations would leave it, turns Serve's own validation off.
    assert build_app.__annotations__["args"] is AppArgs


def test_the_bounds_let_the_application_refuse_itself(config: Config) -> None:
    args = AppArgs.model_validate(application(config)["args"])
    # Batch work comes on top of what online requests may take; at the ingress, as much of it again may wait.
    assert deployment(config, "Ingress")["max_ongoing_requests"] >= args.api.max_in_flight * (1 + 2 * BATCH_SHARE)
    engine = deployment(config, "LlavaModel")
    queue = args.engine.max_num_seqs + args.engine.max_waiting
    assert engine["max_ongoing_requests"] > queue * (1 + BATCH_SHARE)
    # A replica gets few batches in advance, and one of online requests beside all the batch work that it takes.
    batch = args.engine.max_num_seqs
    assert batch + int(queue * BATCH_SHARE) == most_requests(args.engine) < 4 * batch
    assert config["http_options"]["request_timeout_s"] > args.api.max_timeout_s
    for name in ("Ingress", "LlavaModel"):
        assert deployment(config, name)["graceful_shutdown_timeout_s"] > args.api.max_timeout_s


def policy(config: Config, name: str) -> Config:
    found: Config = deployment(config, name)["autoscaling_config"]["policy"]
    return found


KWARGS = "autoscaling_config.policy.policy_kwargs"

TYPOS: list[tuple[Callable[[Config], object], str]] = [
    (lambda c: c.update(http_option={}), "http_option: unknown; did you mean http_options?"),
    (lambda c: c["http_options"].update(prot=1), "http_options.prot: unknown; did you mean port?"),
    (
        lambda c: c["controller_options"].update(runtime={}),
        "controller_options.runtime: unknown; did you mean runtime_env?",
    ),
    (lambda c: application(c).update(arg={}), "applications[0].arg: unknown; did you mean args?"),
    (lambda c: application(c)["args"].update(modle="m"), "applications[0].args.modle: unknown; did you mean model?"),
    (
        lambda c: application(c)["args"]["engine"].update(max_num_seq=1),
        "applications[0].args.engine.max_num_seq: unknown; did you mean max_num_seqs?",
    ),
    (
        lambda c: deployment(c, "Ingress").update(num_replica=1),
        "applications[0].deployments[0].num_replica: unknown; did you mean num_replicas?",
    ),
    (
        lambda c: deployment(c, "Ingress")["ray_actor_options"].update(num_gpu=1),
        "applications[0].deployments[0].ray_actor_options.num_gpu: unknown; did you mean num_gpus?",
    ),
    (
        lambda c: deployment(c, "ImagePreprocessor")["autoscaling_config"].update(max_replica=1),
        "applications[0].deployments[1].autoscaling_config.max_replica: unknown; did you mean max_replicas?",
    ),
    (
        lambda c: deployment(c, "LlavaModel").update(backpressure_config={"status": 429}),
        "applications[0].deployments[2].backpressure_config.status: unknown; did you mean status_code?",
    ),
    (
        lambda c: deployment(c, "LlavaModel")["request_router_config"].update(request_router_kwargs={"slak": 4}),
        "applications[0].deployments[2].request_router_config.request_router_kwargs.slak: unknown; did you mean slack?",
    ),
    (
        lambda c: policy(c, "LlavaModel")["policy_kwargs"].update(target_wait=1),
        f"applications[0].deployments[2].{KWARGS}.target_wait: unknown; did you mean target_wait_s?",
    ),
    (
        lambda c: policy(c, "ImagePreprocessor").pop("policy_kwargs"),
        f"applications[0].deployments[1].{KWARGS}.target_wait_s: missing",
    ),
    (
        lambda c: deployment(c, "LlavaModel").update(name="LavaModel"),
        "applications[0].deployments[2].name: LavaModel: unknown; did you mean LlavaModel?",
    ),
]


@pytest.mark.parametrize(("break_it", "sentence"), TYPOS, ids=[sentence.split(":")[0] for _, sentence in TYPOS])
def test_a_typo_is_refused_by_name(config: Config, break_it: Callable[[Config], object], sentence: str) -> None:
    break_it(config)
    assert sentence in check(config)


def test_a_wrong_value_is_refused_with_its_place(config: Config) -> None:
    application(config)["args"]["engine"]["max_num_seqs"] = 0
    [sentence] = check(config)
    assert sentence.startswith("applications[0].args.engine.max_num_seqs: ")


def test_a_wrong_value_is_refused_where_serve_takes_any_dict(config: Config) -> None:
    deployment(config, "ImagePreprocessor")["autoscaling_config"]["max_replicas"] = "many"
    deployment(config, "LlavaModel")["request_router_config"]["max_backoff_s"] = "long"
    first, second = check(config, cpus=2)
    assert first.startswith("applications[0].deployments[1].autoscaling_config.max_replicas: ")
    assert second.startswith("applications[0].deployments[2].request_router_config.max_backoff_s: ")


@pytest.mark.parametrize(
    ("changes", "routing", "sentence"),
    [
        (
            {},
            {"max_per_replica": 31},
            "request_router_config.request_router_kwargs.max_per_replica: 31; a replica's batch has 32: leave it out, "
            "and each replica says what it takes",
        ),
        (
            {"max_ongoing_requests": 112},
            {},
            "max_ongoing_requests: 112; a replica gets 112 requests, and beside them health checks and aborts would "
            "wait: set more",
        ),
        (
            {"ray_actor_options": {"runtime_env": {"env_vars": {ENGINE_VARIABLE: '{"max_num_seqs": 200}'}}}},
            {},
            "max_ongoing_requests: 256; a replica gets 400 requests, and beside them health checks and aborts would "
            "wait: set more",
        ),
    ],
)
def test_a_replica_gets_requests_for_its_batch_and_has_room_for_other_calls(
    config: Config, changes: Config, routing: Config, sentence: str
) -> None:
    model = deployment(config, "LlavaModel")
    model.update(changes)
    model["request_router_config"]["request_router_kwargs"].update(routing)
    assert check(config) == [f"applications[0].deployments[2].{sentence}"]


@pytest.mark.parametrize("seconds", [0, -1, "fast", None])
def test_a_target_that_is_no_time_is_refused(config: Config, seconds: object) -> None:
    policy(config, "LlavaModel")["policy_kwargs"]["target_wait_s"] = seconds
    assert check(config) == [
        f"applications[0].deployments[2].{KWARGS}.target_wait_s: must be a positive number of seconds"
    ]


def test_more_gpus_than_one_replica_uses_are_refused(config: Config) -> None:
    options = deployment(config, "LlavaModel")["ray_actor_options"]
    options["num_gpus"] = 1
    assert check(config) == []
    options["num_gpus"] = 2
    assert check(config) == [
        "applications[0].deployments[2].ray_actor_options.num_gpus: 2; a replica runs its model on one GPU, so more "
        "would lie idle: set 1, and more replicas"
    ]


def test_a_deployment_that_is_not_named_is_refused(config: Config) -> None:
    application(config)["deployments"].pop()
    assert check(config) == [
        "applications[0].deployments: LlavaModel is missing; Serve would reserve a whole CPU for it"
    ]


def test_what_does_not_fit_is_refused(config: Config) -> None:
    deployment(config, "LlavaModel")["autoscaling_config"]["max_replicas"] = 2
    assert check(config, cpus=2) == ["the replicas need up to 3.25 CPUs, and there are 2"]
    assert check(config) == []


@pytest.mark.parametrize("config", [None, [], "text", {"applications": 3}, {"applications": [{}]}])
def test_what_is_no_config_is_refused(config: object) -> None:
    assert check(config)


def test_the_application_refuses_a_typo_at_deploy() -> None:
    with pytest.raises(ValidationError, match="modle"):
        AppArgs.model_validate({"modle": "builtin"})


def test_the_names_are_those_of_the_deployments() -> None:
    ingress = build_app(AppArgs())._bound_deployment
    tiers = [each._bound_deployment for each in ingress.init_args if isinstance(each, Application)]
    assert tuple(each.name for each in (ingress, *tiers)) == DEPLOYMENTS


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(CONFIG.read_text().replace("num_replicas", "num_replica"))
    command = [sys.executable, "-m", "deployments.tools.check_config", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "did you mean num_replicas?" in done.stderr
    assert "Traceback" not in done.stderr
