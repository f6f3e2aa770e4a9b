"""Runs a Serve config on a Ray cluster of its own until standard input ends, then drains. `local_cluster` starts it.

The end of standard input is the signal, because it also comes if the parent dies: no process remains.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, LoggingConfig
from ray.serve.scripts import run as serve_run

from ..model import LlavaModel
from .gpus import reserve_gpus, unused_gpus

APPLICATION = "llava"
OBJECT_STORE_BYTES = 256 << 20
"""For prepared prompts of a few megabytes; Ray's default is a third of the machine's memory."""


def main() -> int:
    """The exit status is 0 if the application ran and ended normally."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.local_worker", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--ray-dir", type=Path, required=True, help="folder of Ray's files; a short path, since it holds sockets"
    )
    parser.add_argument(
        "--report",
        type=Path,
        required=True,
        help="file for the stage, then Ray's address or the failure",
    )
    parser.add_argument("--num-cpus", type=int, required=True)
    parser.add_argument("--dashboard-port", type=int, help="none: no dashboard")
    options = parser.parse_args()

    stop = threading.Event()
    threading.Thread(target=_wait_for_end_of_input, args=(stop,), daemon=True).start()
    ray.init(
        address="local",
        num_cpus=options.num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=options.dashboard_port is not None,
        dashboard_host="127.0.0.1",
        dashboard_port=options.dashboard_port,
        _temp_dir=str(options.ray_dir),
    )
    _report(options.report, stage="Ray runs; Serve starts")
    gpus = ray.cluster_resources().get("GPU", 0)
    config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    reserve_gpus(config, gpus)
    options.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        serve_run.main(["--non-blocking", str(options.config)], standalone_mode=False)
        if logging_config := config.get("logging_config"):  # which `serve run` does not pass to the proxies
            _get_global_client().update_global_logging_config(LoggingConfig(**logging_config))
        failure = _wait_for_running(stop, options.report)
        devices = _devices() if failure is None else []
        _report(
            options.report,
            ray_address=ray.get_runtime_context().gcs_address,
            metrics_port=ray.nodes()[0]["MetricsExportPort"],
            failure=failure,
            devices=devices,
            warning=unused_gpus(config, gpus, devices),
        )
        if failure is None:
            stop.wait()
            print("Draining: new requests are refused, and requests in flight are finished.", flush=True)
            serve.get_app_handle(APPLICATION).broadcast("drain").results()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0 if failure is None else 1


def _wait_for_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 1024):  # not `sys.stdin`: a thread that holds its lock breaks the interpreter's exit
        pass
    stop.set()


def _wait_for_running(stop: threading.Event, report: Path) -> str | None:
    """Reports the stage of the start. Returns None once all replicas run, or else the failure."""
    while not stop.wait(0.2):
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            _report(report, stage=_stage(application))
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return None
        if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
            failed = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY)
            causes = [each.message for each in application.deployments.values() if each.status in failed]
            return "\n".join([application.message, *causes])
    return "It was stopped before it ran."


def _stage(application: ApplicationStatusOverview) -> str:
    ready = [name for name, each in application.deployments.items() if each.status == DeploymentStatus.HEALTHY]
    starting = [name for name in application.deployments if name not in ready]
    parts = {"ready": ready, "starting": starting}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _devices() -> list[str]:
    """Where the model's replicas run; none does where the tier sleeps already."""
    with suppress(DeploymentUnavailableError):
        devices: list[str] = serve.get_deployment_handle(LlavaModel.__name__, APPLICATION).broadcast("device").results()
        return devices
    return []


def _report(path: Path, **report: str | int | list[str] | None) -> None:
    """Writes the report atomically."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
