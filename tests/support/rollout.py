"""Deploys a config to a running cluster as another Ray job: `python -m support.rollout ADDRESS CONFIG`.

It ends when the deployment has succeeded or failed, and prints its status and messages as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from support.paths import ROOT, TESTS

APPLICATION = "llava"
BEGUN_S = 3.0
"""By then Serve has begun what a deployment changes."""


def deploy(config: dict[str, Any], address: str, file: Path) -> dict[str, Any]:
    """The status after a deployment, and the `message`s of the application and its deployments as one text."""
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "support.rollout", address, str(file)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reported: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reported


def main(address: str, file: str) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import ApplicationStatus
    from ray.serve.scripts import run

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    run.main(["--non-blocking", file], standalone_mode=False)
    begun = time.monotonic() + BEGUN_S
    while True:
        status = serve.status().applications[APPLICATION]
        if status.status != ApplicationStatus.DEPLOYING and time.monotonic() > begun:
            break
        time.sleep(0.2)
    messages = [status.message, *(each.message for each in status.deployments.values())]
    print(json.dumps({"status": status.status, "message": "\n".join(messages)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
