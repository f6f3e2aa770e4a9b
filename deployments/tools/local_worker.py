"""Runs a Serve config on a Ray of its own until standard input ends, then drains. `local_cluster` is its parent.

The end of standard input is the signal, because it also comes when the parent dies: nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, DeploymentStatus
from ray.serve.scripts import run as serve_run

APPLICATION = "llava"
OBJECT_STORE_BYTES = 256 << 20
"""Prepared prompts of a few megabytes pass through it; Ray's default is a third of the machine's memory."""


def main() -> int:
    """The exit status is 0 if the application ran and ended in order."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.local_worker", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--ray-dir", type=Path, required=True, help="for Ray's files, short: sockets lie in it")
    parser.add_argument("--report", type=Path, required=True, help="gets Ray's address, or why there is none, as JSON")
    parser.add_argument("--num-cpus", type=int, required=True)
    options = parser.parse_args()

    stop = threading.Event()
    threading.Thread(target=_wait_for_end_of_input, args=(stop,), daemon=True).start()
    ray.init(
        address="local",
        num_cpus=options.num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=str(options.ray_dir),
    )
    try:
        serve_run.main(["--non-blocking", str(options.config)], standalone_mode=False)
        failure = _wait_until_running(stop)
        _report(options.report, ray_address=ray.get_runtime_context().gcs_address, failure=failure)
        if failure is None:
            stop.wait()
            print("Draining: no new request is let in, and those inside are finished.", flush=True)
            serve.get_app_handle(APPLICATION).broadcast("drain").results()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0 if failure is None else 1


def _wait_for_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 1024):  # not `sys.stdin`: a thread inside its lock breaks the interpreter's exit
        pass
    stop.set()


def _wait_until_running(stop: threading.Event) -> str | None:
    """Returns None when all replicas run, else why they do not."""
    while not stop.wait(0.2):
        application = serve.status().applications.get(APPLICATION)
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return None
        if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
            failed = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY)
            causes = [each.message for each in application.deployments.values() if each.status in failed]
            return "\n".join([application.message, *causes])
    return "It was told to stop before it ran."


def _report(path: Path, **report: str | None) -> None:
    """Appears whole or not at all."""
    half = path.with_suffix(".part")
    half.write_text(json.dumps(report), encoding="utf-8")
    half.rename(path)


if __name__ == "__main__":
    sys.exit(main())
