"""The Kubernetes manifests as kustomize renders them: valid by the schemas, one application with `serve_config.yaml`.

No cluster is here: what only one shows (images, volumes, the operator's work) is tried by nothing.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from deployments.router import most_requests
from deployments.tools import config
from deployments.tools.check_config import check
from deployments.tools.kubernetes import CHANGES, FOLDERS, PATCH, WHEEL, changed, main
from deployments.tools.serve_env import read_serve_env
from llava_serve import __version__
from llava_serve.config import EngineOptions
from support.kubernetes import COMPONENTS, K8S, WHOLE, Object, overlay, pod_templates, ray_groups, ray_service, rendered
from support.kubernetes import serve_config as serve_config_of
from support.paths import CONFIG, ROOT

KUBERNETES = "1.34"

SCHEMA = json.loads((ROOT / "tests" / "schemas" / "rayservice.json").read_text())

NO_SCHEMA = {"PodMonitor"}
"""Kinds whose schemas are in no package: nothing but their names, ports and labels is checked."""

OF_PODS = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "HF_HUB_OFFLINE", "HOME"}
"""Settings of the pods beside the production profile."""

APPLICATIONS = ("base", "overlays/gpu", "overlays/production")


@pytest.mark.parametrize("name", [*WHOLE, *(pytest.param(name, marks=pytest.mark.extended) for name in COMPONENTS)])
def test_all_that_is_rendered_is_valid(name: str) -> None:
    for each in rendered(name):
        validate(each)


def test_a_typo_is_not_valid() -> None:
    service = copy.deepcopy(ray_service("base"))
    service["spec"]["serveConfigv2"] = service["spec"].pop("serveConfigV2")
    with pytest.raises(jsonschema.ValidationError, match="serveConfigv2"):
        validate(service)
    service = copy.deepcopy(ray_service("base"))
    container = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["securityContext"]["runAsNonRot"] = True
    with pytest.raises(jsonschema.ValidationError, match="runAsNonRot"):
        validate(service)
    [budget] = [each for each in copy.deepcopy(rendered("overlays/gpu")) if each["kind"] == "PodDisruptionBudget"]
    budget["spec"]["minAvailabel"] = budget["spec"].pop("minAvailable")
    with pytest.raises(kubernetes_validate.ValidationError, match="minAvailabel"):
        validate(budget)


def test_what_is_generated_agrees_with_its_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--folder", str(K8S)]) == 0
    folder = shutil.copytree(K8S, tmp_path / "k8s")
    changes = folder / "base" / CHANGES
    changes.write_text(changes.read_text().replace("host: 0.0.0.0", "host: 10.0.0.1"))
    assert main(["--check", "--folder", str(folder)]) == 1
    assert capsys.readouterr().err.count(PATCH) == len(FOLDERS)  # the GPUs' is made on top of the base's
    assert main(["--folder", str(folder)]) == 0
    assert "host: 10.0.0.1" in (folder / "components" / "gpu" / PATCH).read_text()
    assert main(["--check", "--folder", str(folder)]) == 0


def test_changes_name_what_is_there() -> None:
    original = {"a": 1, "list": [{"name": "one", "x": 1}, {"name": "two"}]}
    changes = {"a": None, "b": 2, "list": [{"name": "one", "y": 3}]}
    assert changed(original, changes) == {"b": 2, "list": [{"name": "one", "x": 1, "y": 3}, {"name": "two"}]}
    for wrong in ({"list": [{"name": "three"}]}, {"c": None}):
        with pytest.raises(KeyError):
            changed(original, wrong)


@pytest.mark.parametrize(("name", "folders"), [("base", FOLDERS[:1]), *((name, FOLDERS) for name in APPLICATIONS[1:])])
def test_the_application_is_that_of_serve_config_with_the_changes(name: str, folders: tuple[str, ...]) -> None:
    expected = yaml.safe_load(config.packaged(config.CONFIG, WHEEL))
    for folder in folders:
        expected = changed(expected, yaml.safe_load((K8S / folder / CHANGES).read_text()))
    assert serve_config_of(name) == expected
    here = ray_service(name)["spec"]["serveConfigV2"].replace(f"{WHEEL}.", "deployments.")  # Ray imports what it names
    assert check(yaml.safe_load(here)) == []


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_process_has_the_production_profile(name: str, tmp_path: Path) -> None:
    profile = tmp_path / "production.env"
    profile.write_text(config.packaged(config.PROFILE, WHEEL))
    settings = settings_of(name)
    assert {name: value for name, value in settings["data"].items() if name not in OF_PODS} == read_serve_env(profile)
    assert settings["data"].keys() >= OF_PODS
    for group in ray_groups(name):
        [container] = group["template"]["spec"]["containers"]
        # The name has a hash of the data.
        assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    assert re.fullmatch(r"llava-environment-\w{10}", settings["metadata"]["name"])


@pytest.mark.parametrize("name", WHOLE)
def test_the_images_are_targets_of_the_dockerfile_in_this_version(name: str) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    images = {each["image"] for template in pod_templates(name) for each in template["spec"]["containers"]}
    target = "cuda" if name.startswith("overlays/") else "cpu"
    assert images - {"redis:7.2.5"} == {f"llava-serve:{__version__}-{target}"}
    assert target in targets


def test_the_readmes_overlay_takes_the_image_from_its_registry() -> None:
    [text] = re.findall(r"^```yaml\n(.+?)^```", (K8S / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    objects = overlay(yaml.safe_load(text))
    for each in objects:
        validate(each)
    [service] = [each for each in objects if each["kind"] == "RayService"]
    images = set(re.findall(r"'image': '([^']+)'", str(service)))
    assert images == {f"registry.example/llava-serve:{__version__}-cuda"}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_worker_has_the_keys_and_models_that_the_application_opens(name: str) -> None:
    arguments = serve_config_of(name)["applications"][0]["args"]
    for group in ray_groups(name)[1:]:
        spec = group["template"]["spec"]
        mounts = {each["mountPath"]: each for each in spec["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each for each in spec["volumes"]}
        keys = mounts[str(Path(arguments["api"]["api_keys_file"]).parent)]
        # A file that is mounted by `subPath` would never be updated.
        assert keys.keys() == {"name", "mountPath", "readOnly"}
        assert volumes[keys["name"]]["secret"] == {"secretName": "llava-api-keys"}
        if arguments["model"] != "builtin":
            models = mounts[str(Path(arguments["model"]).parent)]
            [claim] = [each for each in rendered("models") if each["kind"] == "PersistentVolumeClaim"]
            assert volumes[models["name"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_job_downloads_what_the_application_opens() -> None:
    arguments = serve_config_of("overlays/gpu")["applications"][0]["args"]
    [job] = [each for each in rendered("models") if each["kind"] == "Job"]
    [script] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    folders = re.findall(r"^hf download \S+ --local-dir (\S+)$", script, re.MULTILINE)
    assert sorted(folders) == sorted([arguments["model"], arguments["vision_tower"]])


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_pod_outlives_its_longest_answer(name: str) -> None:
    longest = max(each["graceful_shutdown_timeout_s"] for each in deployments_of(name))
    settings = settings_of(name)["data"]
    for group in ray_groups(name)[1:]:
        ends = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert longest < float(settings["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < ends
        assert ray_service(name)["spec"]["rayClusterDeletionDelaySeconds"] >= ends


@pytest.mark.parametrize("name", APPLICATIONS)
def test_the_replicas_fit_the_groups_whose_labels_they_ask_for(name: str) -> None:
    """By Ray's own reading of the manifest, as its autoscaler has it."""
    groups = node_types(name)
    assert groups.pop("headgroup")["resources"]["CPU"] == 0
    most: dict[str, dict[str, float]] = {group: {"CPU": 0.0, "GPU": 0.0} for group in groups}
    for deployment in deployments_of(name):
        options = deployment["ray_actor_options"]
        asked = (options.get("label_selector") or {}).items()
        [group] = [group for group, each in groups.items() if asked <= each["labels"].items()]
        count = deployment.get("num_replicas") or deployment["autoscaling_config"]["max_replicas"]
        for resource, option in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            assert options.get(option, 0) <= groups[group]["resources"].get(resource, 0)
            most[group][resource] += count * options.get(option, 0)
    for group, needed in most.items():
        for resource, amount in needed.items():
            assert amount <= groups[group]["max_workers"] * groups[group]["resources"].get(resource, 0)


def test_in_the_base_replacements_fit_beside_what_they_replace() -> None:
    [worker] = [each for group, each in node_types("base").items() if group != "headgroup"]
    assert all(each["max_surge_percent"] == 100 for each in deployments_of("base"))
    first = sum(each["ray_actor_options"]["num_cpus"] for each in deployments_of("base"))
    assert 2 * first <= worker["min_workers"] * worker["resources"]["CPU"]


def test_a_gpu_is_kept_longer_than_a_cpu() -> None:
    idle = {group: each.get("idle_timeout_s") for group, each in node_types("overlays/gpu").items()}
    assert idle["model"] > idle["http"] > idle["images"] > 0


def test_selectors_and_ports_find_the_pods() -> None:
    name = "overlays/production"
    groups = [(each.get("groupName", "headgroup"), each["template"]) for each in ray_groups(name)]
    groups += [("", each["spec"]["template"]) for each in rendered(name) if each["kind"] == "StatefulSet"]
    pods, ports = [], set()
    for group, template in groups:
        labels = template["metadata"]["labels"]
        for container in template["spec"]["containers"]:
            node_type = container["name"].removeprefix("ray-")
            pods.append(labels | {"ray.io/node-type": node_type, "ray.io/group": group})  # as KubeRay adds them
            ports |= {port["name"] for port in container["ports"]}
    kinds = set()
    for each in rendered(name):
        spec = each.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector:
            kinds.add(each["kind"])
            assert any(selector.get("matchLabels", selector).items() <= labels.items() for labels in pods), each
        named = [rule["port"] for source in spec.get("ingress", ()) for rule in source.get("ports", ())]
        named += [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", ())]
        assert {port for port in named if isinstance(port, str)} <= ports
    assert kinds == {"NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Service", "StatefulSet"}


def test_a_gateway_moves_no_more_requests_than_there_is_capacity() -> None:
    upgrade = ray_service("overlays/production")["spec"]["upgradeStrategy"]
    assert upgrade["type"] == "NewClusterWithIncrementalUpgrade"
    options = upgrade["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100  # KubeRay refuses others


def test_the_tiers_grow_by_their_work_and_no_replica_gets_many_batches() -> None:
    for each in (yaml.safe_load(CONFIG.read_text()), serve_config_of("overlays/gpu")):
        [application] = each["applications"]
        tiers = {each["name"]: each for each in application["deployments"]}
        for name in ("ImagePreprocessor", "LlavaModel"):
            function = tiers[name]["autoscaling_config"]["policy"]["policy_function"]
            assert function == application["import_path"].replace("app:build_app", "autoscaling:WorkPolicy")
        engine = EngineOptions(**application["args"]["engine"])
        assert most_requests(engine) < min(4 * engine.max_num_seqs, tiers["LlavaModel"]["max_ongoing_requests"])


def validate(each: Object) -> None:
    """Raises if an object is not valid by the schema of its kind; pods of a RayService by Kubernetes' own, too."""
    if each["kind"] == "RayService":
        jsonschema.Draft202012Validator(SCHEMA).validate(each)
        cluster = each["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    elif each["kind"] not in NO_SCHEMA:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def settings_of(name: str) -> Object:
    """The pods' settings: the one `ConfigMap` beside the dashboard's."""
    maps = [each for each in rendered(name) if each["kind"] == "ConfigMap"]
    [settings] = [each for each in maps if each["metadata"]["name"] != "llava-dashboard"]
    return settings


def deployments_of(name: str) -> list[Object]:
    [application] = serve_config_of(name)["applications"]
    found: list[Object] = application["deployments"]
    return found


def node_types(name: str) -> dict[str, Any]:
    """The groups by name, with what Ray's autoscaler counts on."""
    cluster = {
        "metadata": {"name": "llava", "namespace": "default"},
        "spec": ray_service(name)["spec"]["rayClusterConfig"],
    }
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(cluster))["available_node_types"]
    return found
