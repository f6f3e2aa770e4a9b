"""GPUs of this machine for the model's replicas, where the config leaves that open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..model import LlavaModel
from .config import IMPORT_PATHS


def reserve_gpus(config: Mapping[str, Any], found: float) -> None:
    """Gives each replica of the model a GPU, in place, where there is one, and the config has neither `num_gpus` for it
    nor `device: cpu`.

    Args:
        config: a Serve config, after the strict check.
        found: GPUs of the cluster.
    """
    if found < 1:
        return
    for application in config["applications"]:
        if application.get("import_path") not in IMPORT_PATHS or _asks_for_cpu(application):
            continue
        for deployment in application["deployments"]:
            if deployment["name"] == LlavaModel.__name__:
                deployment.setdefault("ray_actor_options", {}).setdefault("num_gpus", 1)


def unused_gpus(config: Mapping[str, Any], found: float, devices: Sequence[str]) -> str | None:
    """A warning where GPUs are there, and no replica of the model is on one though the config does not say `cpu`."""
    if not found or any(device.startswith("cuda") for device in devices):
        return None
    if any(_asks_for_cpu(application) for application in config["applications"]):
        return None
    return (
        f"This machine has {found:g} GPU(s), and the model runs on the CPU: {LlavaModel.__name__}'s "
        "ray_actor_options.num_gpus is 0, or torch is its build for CPUs. device: cpu makes this choice explicit."
    )


def _asks_for_cpu(application: Mapping[str, Any]) -> bool:
    return bool(application.get("args", {}).get("device") == "cpu")
