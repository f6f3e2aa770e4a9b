"""A process that is lost under 8 streams, under Serve's defaults and the production profile.

make test-faults    # logs how each request ended, and the seconds until the service was back

No request ends silently or hangs, requests that had not begun are done elsewhere or refused with 503, the service comes
back by itself, and nothing is left.
"""

from __future__ import annotations

import asyncio
import io
import logging
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from deployments.tools.local_cluster import LocalCluster, local_cluster
from deployments.tools.serve_env import read_serve_env
from support.bursts import at_rest, remaining
from support.faults import Asker, Load, Outcome, fault_under_load, holdings, kill, large_picture, processes_of
from support.paths import ROOT
from testbed.counted import counted_config
from testbed.health_checks import unanswered_checks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BACK_S = 180.0
"""On a machine that others use, too; the log has the figures."""
FORCE_STOP = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}

DECODE_BYTES = 192 << 20
"""Enough for 12 megapixels, too little for 63."""

WAITS = {"answer", "refused"}
"""A request of which nothing had been sent."""
PROXY_LOST = {"cut", "closed", "no connection", "refused", "answer"}
"""The connection itself is gone: nothing can be said over it, and every client notices."""

EXPECTED: dict[str, dict[str, tuple[set[str], set[str], set[str]]]] = {
    # What ended the streams, the requests that had not begun, and later ones.
    "picture replica": {"": ({"answer"}, {"answer"}, {"answer"})},
    "model replica": {"": ({"error event", "answer"}, WAITS, WAITS)},
    "ingress replica": {
        "default": ({"error event", "answer"}, WAITS, WAITS),
        "production": ({"cut", "answer"}, WAITS, WAITS),  # HAProxy can only cut what it has begun to send
    },
    "controller": {"": ({"answer"}, {"answer"}, {"answer"})},
    "proxy": {"": (PROXY_LOST, PROXY_LOST, PROXY_LOST)},
    "stopped model replica": {"": ({"error event", "answer"}, WAITS, WAITS)},
    "engine that hangs": {"": ({"error event", "answer"}, WAITS, WAITS)},
}

TITLES = {
    "picture replica": "ray::ServeReplica:llava:ImagePreprocessor",
    "model replica": "ray::ServeReplica:llava:LlavaModel",
    "stopped model replica": "ray::ServeReplica:llava:LlavaModel",
    "engine that hangs": "ray::ServeReplica:llava:LlavaModel",
    "ingress replica": "ray::ServeReplica:llava:Ingress",
    "controller": "ray::ServeController",
}
PROXIES = {"default": "ray::ProxyActor", "production": "haproxy -"}

log = logging.getLogger(__name__)


@pytest.fixture(scope="module", params=["default", "production"])
def running(request: pytest.FixtureRequest) -> Iterator[tuple[str, LocalCluster]]:
    """The application, and the name of its profile."""
    profile = read_serve_env(ROOT / "production.env") if request.param == "production" else {}
    config = counted_config()
    config["applications"][0]["args"]["images"]["decode_memory_bytes"] = DECODE_BYTES
    with local_cluster(config, num_cpus=2, profile=profile | FORCE_STOP) as cluster:
        yield request.param, cluster


@pytest.mark.parametrize("lost", EXPECTED)
def test_a_lost_process_is_replaced_and_every_request_has_an_end(
    lost: str, running: tuple[str, LocalCluster], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    profile, cluster = running
    rest = asyncio.run(at_rest(cluster.url))
    before = holdings(cluster)
    victims = processes_of(cluster, title=TITLES.get(lost, PROXIES[profile]))
    unanswered = unanswered_checks(cluster)

    load = asyncio.run(fault_under_load(cluster.url, cause(lost, victims, cluster.url), BACK_S))
    log.info("%s, %s: %s", profile, lost, load)
    check(load, *(EXPECTED[lost].get(profile) or EXPECTED[lost][""]))

    if lost.startswith("stopped"):
        assert unanswered_checks(cluster) - unanswered >= 3
    assert psutil.wait_procs(victims, timeout=60)[1] == []
    wait_until(lambda: remaining(cluster.url) == rest)
    deadline = time.monotonic() + 90
    while left := before.left_by(holdings(cluster)):
        assert time.monotonic() < deadline, left
        time.sleep(1)


def test_a_picture_that_takes_too_much_memory_takes_no_other_request_with_it(
    running: tuple[str, LocalCluster],
) -> None:
    _, cluster = running
    replicas = processes_of(cluster, title=TITLES["picture replica"])
    too_large = io.BytesIO()
    Image.new("RGBA", (8000, 7900), (255, 0, 0, 200)).save(too_large, "PNG", compress_level=1)

    async def ask() -> list[Outcome]:
        async with Asker(cluster.url) as asker:
            pictures = [large_picture(100), too_large.getvalue(), large_picture(101), too_large.getvalue() + b"0"]
            return await asyncio.gather(*(asker.ask(each, max_tokens=20) for each in pictures))

    outcomes = asyncio.run(ask())
    assert [each.kind for each in outcomes] == ["answer", "400", "answer", "400"], outcomes
    assert all("takes too much memory" in each.detail for each in outcomes[1::2])
    assert processes_of(cluster, title=TITLES["picture replica"]) == replicas


def cause(lost: str, victims: list[psutil.Process], url: str) -> Callable[[], Any]:
    if lost == "engine that hangs":
        return lambda: httpx.get(f"{url}/hang", timeout=60).raise_for_status()
    if lost.startswith("stopped"):
        [victim] = victims
        return lambda: victim.send_signal(signal.SIGSTOP)
    return lambda: kill(victims)


def check(load: Load, streams: set[str], others: set[str], later: set[str]) -> None:
    for allowed, outcomes in ((streams, load.streams), (others, load.others), (later, load.later)):
        assert [each for each in outcomes if each.kind not in allowed] == []
