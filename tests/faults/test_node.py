"""A node that is lost: the replicas on others go on, and a new node gets a replica."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deployments.tools.local_cluster import LocalCluster, environment, local_cluster
from deployments.tools.serve_env import read_serve_env
from support.bursts import remaining
from support.faults import fault_under_load, processes_of
from support.paths import ROOT
from testbed.counted import counted_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCALE_S = 150.0
BACK_S = 180.0

log = logging.getLogger(__name__)


@contextmanager
def node(running: LocalCluster, profile: dict[str, str]) -> Iterator[psutil.Process]:
    """A worker node of two CPUs, with the settings of the profile; its parent process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "2"]
    command += ["--address", running.ray_address, "--node-ip-address", "127.0.0.1", "--include-log-monitor", "false"]
    # The application's own node is set up to be alone, and a node with that setting joins none.
    env = environment(os.environ["RAY_AUTH_TOKEN"]) | profile | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with (running.log.parent / "nodes.log").open("ab") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    parent = psutil.Process(started.pid)
    try:
        yield parent
    finally:
        lose(parent)
        started.wait()


def lose(parent: psutil.Process) -> None:
    """Ends all processes of a node, as a machine's end does."""
    with suppress(psutil.NoSuchProcess):
        lost = [*parent.children(recursive=True), parent]
        for each in lost:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(lost, timeout=20)


def run_on(running: LocalCluster, profile: dict[str, str], *command: str) -> str:
    """Runs a Python command as a job of the cluster, with the settings of the profile; gives its output."""
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(os.environ["RAY_AUTH_TOKEN"]) | profile,
        cwd=ROOT,
        check=False,
        timeout=SCALE_S,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


WAIT = """
import sys, time, ray
from ray import serve

ray.init(address=sys.argv[1], log_to_driver=False)
while serve.status().applications["llava"].deployments["LlavaModel"].replica_states.get("RUNNING", 0) != 3:
    time.sleep(0.5)
"""


def three_replicas(running: LocalCluster, profile: dict[str, str]) -> float:
    """Seconds until three model replicas run."""
    start = time.monotonic()
    run_on(running, profile, "-c", WAIT, running.ray_address)
    return time.monotonic() - start


def config_of(count: int) -> dict[str, Any]:
    """So many model replicas, at most one per node, and requests spread over them evenly."""
    config = counted_config()
    [model] = [each for each in config["applications"][0]["deployments"] if each["name"] == "LlavaModel"]
    model |= {"num_replicas": count, "max_replicas_per_node": 1}
    model["request_router_config"]["request_router_kwargs"] = {"slack": 0}
    return config


@pytest.mark.parametrize("name", ["default", "production"])
def test_a_lost_node_costs_only_the_streams_of_its_replica(name: str, tmp_path: Path) -> None:
    profile = read_serve_env(ROOT / "production.env") if name == "production" else {}
    config = config_of(1)
    with (
        local_cluster(config, num_cpus=2, profile=profile) as running,
        node(running, profile) as first,
        node(running, profile),
    ):
        [model] = [each for each in config["applications"][0]["deployments"] if each["name"] == "LlavaModel"]
        model["num_replicas"] = 3
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        deploy = ("-m", "ray.serve.scripts", "run", "--non-blocking", "--address", running.ray_address, str(file))
        run_on(running, profile, *deploy)
        log.info("Three replicas after %.1f s", three_replicas(running, profile))
        files = {each: each.num_fds() for each in processes_of(running, title="ServeReplica:llava:Ingress")}

        load = asyncio.run(fault_under_load(running.url, lambda: lose(first), BACK_S))
        log.info("%s, node: %s", name, load)
        ends = Counter(each.kind for each in load.streams)
        assert ends.keys() == {"error event", "answer"}  # those on the node, and those on the two others
        assert {each.kind for each in (*load.others, *load.later)} <= {"answer", "refused"}

        with node(running, profile):
            log.info("Three replicas again %.1f s after a new node's start", three_replicas(running, profile))
            for _ in range(10):  # of one replica or another
                rest = remaining(running.url)
                assert (rest["sequences"], rest["blocks"]) == (0, 0)
            assert all(each.num_fds() <= before + 15 for each, before in files.items())
