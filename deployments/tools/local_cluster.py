"""Runs the application on a Ray cluster of its own on this machine, and removes it completely at the end."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_serve.cli.serve_config import address_of

from .serve_env import EXTRA_PORTS, own_places

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
"""Of an application that has not started: there is nothing to drain."""
_UNASKED = range(20_000, 32_768)
"""Ports above those of Ray's workers, and below those that a system gives to a program that asks for any."""
STANDARD_OUTPUT = Path("-")
"""As the log: the output of Ray and the replicas goes where this process's own goes."""
_RAY_TIMED_OUT = "The current node timed out during startup"
"""How Ray says that its processes did not start in time, which is fixed."""


class LocalClusterError(Exception):
    """The application could not be started; the message is for the terminal."""


@dataclass(frozen=True)
class LocalCluster:
    """A running application.

    Attributes:
        url: of its HTTP endpoint, without a path.
        metrics_url: of the metrics of all tiers, which need no key.
        ray_address: for other Ray jobs on this machine that have the token.
        log: the output of Ray and the replicas; `STANDARD_OUTPUT` if that is its place.
        ports: what the ports that the config and the profile choose are for.
        devices: of the model's replicas.
        warning: what is odd about them.
    """

    url: str
    metrics_url: str
    ray_address: str
    log: Path
    ports: Mapping[int, str]
    process: subprocess.Popen[bytes]
    devices: list[str]
    warning: str | None

    def wait(self) -> None:
        """Never returns: raises `LocalClusterError` when the application has ended by itself."""
        self.process.wait()
        raise LocalClusterError(f"The application has ended by itself.\n{log_place(self.log)}")


@contextmanager
def local_cluster(
    config: Mapping[str, Any],
    *,
    num_cpus: int | None = None,
    profile: Mapping[str, str] | None = None,
    tell: Callable[[str], None] | None = None,
    dashboard_port: int | None = None,
    log: Path | None = None,
) -> Iterator[LocalCluster]:
    """Runs an application while the block runs; then it drains and ends.

    It neither joins nor ends another Ray cluster on the machine. Other jobs need its token: the environment's
    `RAY_AUTH_TOKEN`, or else a new random one.

    Args:
        config: a Serve config with one application; its port must be free.
        num_cpus: logical CPUs of Ray; None takes the machine's cores, two at least.
        profile: variables that choose Serve's proxy and transport (`read_serve_env`); None takes Serve's own defaults.
        tell: called with each stage of the start.
        dashboard_port: of Ray's dashboard, to which `serve status` and `serve deploy` talk; None starts none.
        log: file that the output of Ray and the replicas is added to, or `STANDARD_OUTPUT`; None takes a file that a
            normal end removes.

    Raises:
        LocalClusterError: the application cannot start.
    """
    host, port = address_of(config)
    folder = Path(tempfile.mkdtemp(prefix="llava-serve-", dir="/tmp"))  # short: Ray's sockets lie in it
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    config_file, report, log = folder / "config.yaml", folder / "report.json", log or folder / "serve.log"
    config_file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    command = [sys.executable, "-m", f"{__package__}.local_worker", str(config_file)]
    command += ["--ray-dir", str(folder / "ray"), "--report", str(report)]
    command += ["--num-cpus", str(num_cpus or max(2, os.cpu_count() or 1))]
    command += ["--dashboard-port", str(dashboard_port)] if dashboard_port is not None else []
    settings = dict(profile) | own_places(folder, free_ports(len(EXTRA_PORTS))) if profile else {}
    ports = {port: "HTTP"} | {int(settings[name]): purpose for name, purpose in EXTRA_PORTS.items() if settings}
    if dashboard_port is not None:
        ports[dashboard_port] = "Ray's dashboard (token)"
    with nullcontext(None) if log == STANDARD_OUTPUT else log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(token) | settings,
            start_new_session=True,  # Ctrl-C in the terminal ends only this process, which drains first
        )
    keep_log = ready = False
    try:
        local = "127.0.0.1" if host == "0.0.0.0" else host
        url = f"http://{local}:{port}"
        reported = wait_for_ready(process, url, report, log, tell)
        # In a job's process Ray replaces 127.0.0.1 by the machine's own address, where nothing listens.
        address = str(reported["ray_address"]).replace("127.0.0.1:", "0.0.0.0:")
        ports[reported["metrics_port"]] = "metrics of all tiers"
        metrics_url = f"http://127.0.0.1:{reported['metrics_port']}/metrics"
        devices, warning = reported["devices"], reported["warning"]
        running = LocalCluster(url, metrics_url, address, log, ports, process, devices, warning)
        ready = True
        yield running
    except Exception:
        keep_log = True
        raise
    finally:
        end(process, timeout_s=None if ready else STOP_TIMEOUT_S)
        if not keep_log:
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that nothing listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on. Until they are used, no program gets them that asks for any."""
    free: list[int] = []
    for port in random.sample(_UNASKED, len(_UNASKED)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            return free
    raise LocalClusterError("There is no free port.")


def environment(token: str) -> dict[str, str]:
    """The environment of a separate Ray cluster: no variable of another one, and its own token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Ray's daemons then listen on 127.0.0.1 alone. Ray has it for other systems; on Linux it is off unless set.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else lines of different replicas that differ in numbers alone are left out, such as those of requests.
        "RAY_DEDUP_LOGS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def wait_for_ready(
    process: subprocess.Popen[bytes], url: str, report: Path, log: Path, tell: Callable[[str], None] | None
) -> dict[str, Any]:
    """The last report, once all replicas run and `/health` responds; raises `LocalClusterError` if they cannot."""
    deadline = time.monotonic() + START_TIMEOUT_S
    last = ""
    while time.monotonic() < deadline:
        ended = process.poll() is not None  # checked before the report, which the process may have written at its end
        reported: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"stage": ""}
        stage = reported.get("stage")
        if stage is None:
            if reported["failure"] is not None:
                raise cannot_start(reported["failure"], log)
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return reported
        elif ended:
            raise cannot_start("" if log == STANDARD_OUTPUT else log.read_text(encoding="utf-8", errors="replace"), log)
        elif tell and stage and stage != last:
            tell(f"  {stage}")
            last = stage
        time.sleep(0.1)
    raise cannot_start(f"no answer within {START_TIMEOUT_S:.0f} s", log)


def cannot_start(text: str, log: Path) -> LocalClusterError:
    """The error with the last line of the text, which in a traceback is the message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = lines[-1] if lines else "no reason given"
    if _RAY_TIMED_OUT in cause:
        cause = "Ray did not start within its 30 s, since the machine is busy; try again."
    return LocalClusterError(f"The application cannot start: {cause}\n{log_place(log)}")


def log_place(log: Path) -> str:
    """The last line of a message: where to read on."""
    return "The output above says more." if log == STANDARD_OUTPUT else f"Log: {log}"


def end(process: subprocess.Popen[bytes], *, timeout_s: float | None) -> None:
    """Lets the application drain and end; a second interrupt ends it at once. Only its own process group is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
