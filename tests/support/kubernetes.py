"""What `kubectl kustomize` makes of `k8s/`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import ROOT

K8S = ROOT / "k8s"
WHOLE = ("base", "overlays/gpu", "overlays/production", "models")
"""What is applied as it is."""

COMPONENTS = tuple(f"components/{path.name}" for path in sorted((K8S / "components").iterdir()))

Object = dict[str, Any]


@cache
def rendered(name: str) -> list[Object]:
    """The objects of a folder of `k8s/`; a component on the base alone. They are for all tests: none changes them."""
    if name in COMPONENTS:
        return overlay({"resources": ["../../base"], "components": [f"../../{name}"]})
    return list(yaml.safe_load_all(_kustomize(K8S / name)))


def overlay(kustomization: Object) -> list[Object]:
    """The objects of an overlay beside those that are there: kustomize reads no absolute paths."""
    with tempfile.TemporaryDirectory() as folder:
        added = shutil.copytree(K8S, Path(folder) / "k8s") / "overlays" / "added"
        added.mkdir()
        (added / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return list(yaml.safe_load_all(_kustomize(added)))


def ray_service(name: str) -> Object:
    """The only one of a folder."""
    [found] = [each for each in rendered(name) if each["kind"] == "RayService"]
    return found


def serve_config(name: str) -> Object:
    """The parsed Serve config of a folder's RayService."""
    parsed: Object = yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    return parsed


def ray_groups(name: str) -> list[Object]:
    """The group of the head, then those of the workers."""
    cluster = ray_service(name)["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates(name: str) -> Iterator[Object]:
    """Of all that makes pods."""
    for each in rendered(name):
        if each["kind"] == "RayService":
            yield from (group["template"] for group in ray_groups(name))
        elif "template" in each.get("spec", {}):
            yield each["spec"]["template"]


def _kustomize(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: nothing can render k8s/")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # warnings of what is deprecated
    return done.stdout
