"""The Kubernetes manifest: valid against KubeRay's schema, and the same application as `serve_config.yaml`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.tools import config
from deployments.tools.check_config import check
from deployments.tools.serve_env import read_serve_env
from llava_serve import __version__
from support.paths import CONFIG, ROOT

WHEEL = "llava_serve_deployments"
"""The application's package in the image, which installs the wheel."""

OF_PODS = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "HF_HUB_OFFLINE"}
"""Settings of the pods beside the production profile."""

SCHEMA = json.loads((ROOT / "tests" / "schemas" / "rayservice.json").read_text())

ON_PURPOSE = {
    "proxy_location",  # a proxy on every node with replicas
    "http_options.host",
    "controller_options",  # the pods' environment says it to every process
    "applications.llava.args.model",
    "applications.llava.args.vision_tower",
    "applications.llava.args.device",
    "applications.llava.args.engine.max_num_seqs",
    "applications.llava.args.api.api_keys_file",
    "applications.llava.deployments.Ingress.num_replicas",
    "applications.llava.deployments.Ingress.autoscaling_config",
    "applications.llava.deployments.Ingress.max_replicas_per_node",
    "applications.llava.deployments.Ingress.ray_actor_options.num_cpus",
    "applications.llava.deployments.ImagePreprocessor.autoscaling_config.min_replicas",
    "applications.llava.deployments.ImagePreprocessor.autoscaling_config.max_replicas",
    "applications.llava.deployments.ImagePreprocessor.ray_actor_options.num_cpus",
    "applications.llava.deployments.LlavaModel.autoscaling_config.max_replicas",
    "applications.llava.deployments.LlavaModel.autoscaling_config.target_ongoing_requests",
    "applications.llava.deployments.LlavaModel.max_ongoing_requests",
    "applications.llava.deployments.LlavaModel.request_router_config.request_router_kwargs.slack",
    "applications.llava.deployments.LlavaModel.ray_actor_options.num_cpus",
    "applications.llava.deployments.LlavaModel.ray_actor_options.num_gpus",
}


@pytest.fixture
def manifest() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "k8s" / "rayservice.yaml").read_text())
    return parsed


@pytest.fixture
def on_kubernetes(manifest: dict[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return parsed


def test_the_manifest_is_valid(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_the_schema_catches_a_typo(manifest: dict[str, Any]) -> None:
    manifest["spec"]["serveConfigv2"] = manifest["spec"].pop("serveConfigV2")
    with pytest.raises(jsonschema.ValidationError, match="serveConfigv2"):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_its_serve_config_is_right(manifest: dict[str, Any]) -> None:
    here = manifest["spec"]["serveConfigV2"].replace(f"{WHEEL}.", "deployments.")  # Ray imports what it names
    assert check(yaml.safe_load(here)) == []


def test_it_differs_from_serve_config_only_where_it_says(on_kubernetes: dict[str, Any]) -> None:
    shipped = yaml.safe_load(config.packaged(config.CONFIG, WHEEL))
    assert set(differences(shipped, on_kubernetes)) == ON_PURPOSE


def test_the_image_is_of_this_version(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert images == {f"llava-serve:{__version__}"}


def test_every_process_has_the_production_profile(manifest: dict[str, Any], tmp_path: Path) -> None:
    profile = tmp_path / "production.env"
    profile.write_text(config.packaged(config.PROFILE, WHEEL))
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    environments = [group["template"]["spec"]["containers"][0]["env"] for group in groups]
    for environment in environments:
        settings = {each["name"]: each["value"] for each in environment if each["name"] not in OF_PODS}
        assert settings == read_serve_env(profile)


def test_every_worker_has_the_keys_that_the_ingress_requires(
    manifest: dict[str, Any], on_kubernetes: dict[str, Any]
) -> None:
    path = Path(on_kubernetes["applications"][0]["args"]["api"]["api_keys_file"])
    for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        [mount] = [each for each in spec["containers"][0]["volumeMounts"] if each["mountPath"] == str(path.parent)]
        # A file that is mounted by `subPath` would never be updated.
        assert mount == {"name": mount["name"], "mountPath": str(path.parent), "readOnly": True}
        [volume] = [each for each in spec["volumes"] if each["name"] == mount["name"]]
        assert volume == {"name": mount["name"], "secret": {"secretName": "llava-api-keys"}}


def test_a_pod_outlives_its_longest_answer(manifest: dict[str, Any], on_kubernetes: dict[str, Any]) -> None:
    longest = max(each["graceful_shutdown_timeout_s"] for each in on_kubernetes["applications"][0]["deployments"])
    for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        [drain] = [each["value"] for each in container["env"] if each["name"].startswith("RAY_GRACEFUL")]
        assert longest < float(drain) < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_replicas_fit_the_worker_groups(manifest: dict[str, Any], on_kubernetes: dict[str, Any]) -> None:
    cpus = gpus = 0.0
    for deployment in on_kubernetes["applications"][0]["deployments"]:
        most = deployment["autoscaling_config"]["max_replicas"]
        cpus += most * deployment["ray_actor_options"]["num_cpus"]
        gpus += most * deployment["ray_actor_options"].get("num_gpus", 0)
    there_cpus = there_gpus = 0.0
    for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        there_cpus += group["maxReplicas"] * float(group["rayStartParams"].get("num-cpus", limits["cpu"]))
        there_gpus += group["maxReplicas"] * float(limits.get("nvidia.com/gpu", 0))
    assert cpus <= there_cpus
    assert gpus <= there_gpus


def test_the_model_tier_grows_before_a_batch_is_full(on_kubernetes: dict[str, Any]) -> None:
    for each in (yaml.safe_load(CONFIG.read_text()), on_kubernetes):
        [application] = each["applications"]
        batch = application["args"]["engine"]["max_num_seqs"]
        [model] = [each for each in application["deployments"] if each["name"] == "LlavaModel"]
        assert model["autoscaling_config"]["target_ongoing_requests"] == round(0.7 * batch)


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The paths at which two configs differ; lists of named things by their names."""
    one, other = by_name(one), by_name(other)
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            below = f"{path}.{key}" if path else key
            if key in one and key in other:
                yield from differences(one[key], other[key], below)
            else:
                yield below
    elif one != other:
        yield path


def by_name(value: Any) -> Any:
    return {item["name"]: item for item in value} if isinstance(value, list) else value
