"""The choice of a model replica, without Ray: by what it has cached, within a limit on its load."""

from __future__ import annotations

import random
import sys
from collections import Counter

import numpy as np
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata, RunningReplicaInfo
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from deployments import router
from deployments.router import MOST_REQUESTS, Affinity, AffinityRouter, most_requests
from llava_serve.config import EngineOptions
from llava_serve.types import PreparedPrompt

SLACK = 4


def idle(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def test_a_key_stays_where_it_is_cached() -> None:
    affinity = Affinity(SLACK)
    for number in range(50):
        first = affinity.choose(f"picture {number}", idle("a", "b", "c"))
        loads = {**idle("a", "b", "c"), first: SLACK}
        assert affinity.choose(f"picture {number}", loads) == first


def test_an_overloaded_replica_shares_the_key_with_another() -> None:
    affinity = Affinity(SLACK)
    first = affinity.choose("hot", idle("a", "b"))
    [other] = {"a", "b"} - {first}
    assert affinity.choose("hot", {first: SLACK + 1, other: 0}) == other
    assert affinity.choose("hot", {first: 2, other: 3}) == first
    assert affinity.choose("hot", {first: 3, other: 2}) == other


def test_new_keys_go_to_the_less_loaded_of_two() -> None:
    affinity = Affinity(SLACK)
    for number in range(50):
        assert affinity.choose(str(number), {"a": 3, "b": 2}) == "b"


def test_new_keys_are_spread_when_nothing_else_decides() -> None:
    affinity = Affinity(SLACK)
    chosen = Counter(affinity.choose(str(number), idle("a", "b", "c", "d")) for number in range(1000))
    assert all(200 < count < 300 for count in chosen.values())


def test_processes_that_do_not_communicate_choose_the_same_replica() -> None:
    here, there = Affinity(SLACK), Affinity(SLACK)
    for number in range(50):
        assert here.choose(str(number), idle("a", "b", "c")) == there.choose(str(number), idle("c", "a", "b"))


def test_a_replica_that_is_gone_is_not_chosen_and_few_keys_move_with_the_number_of_replicas() -> None:
    affinity = Affinity(SLACK)
    keys = [str(number) for number in range(300)]
    before = {key: affinity.choose(key, idle("a", "b", "c")) for key in keys}
    after = {key: affinity.choose(key, idle("a", "b")) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "c")
    fresh = Affinity(SLACK)
    grown = {key: fresh.choose(key, idle("a", "b", "c", "d")) for key in keys}
    assert all(grown[key] in (before[key], "d") for key in keys)


def test_only_so_many_keys_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "REMEMBERED_KEYS", 3)
    affinity = Affinity(SLACK)
    places = {key: affinity.choose(key, idle("a", "b")) for key in ("1", "2", "3", "4")}
    for key in ("4", "3", "2", "1"):  # asking is using: the oldest comes last
        loads = {replica: 1 if replica == places[key] else 0 for replica in ("a", "b")}
        assert (affinity.choose(key, loads) == places[key]) == (key != "1")


@pytest.mark.parametrize("replicas", [2, 4])
def test_distinct_keys_are_balanced_as_by_two_random_choices(replicas: int) -> None:
    names = [str(number) for number in range(replicas)]
    rng = random.Random(replicas)
    affinity = Affinity(SLACK)
    number = iter(range(10**9))

    def by_affinity(loads: dict[str, int]) -> str:
        return affinity.choose(f"picture {next(number)}", loads)

    def by_chance(loads: dict[str, int]) -> str:
        return min(rng.sample(names, 2), key=loads.__getitem__)

    def excess(choose: object) -> float:
        """Of the most loaded replica above the mean, with 8 requests per replica that end in random order."""
        running: list[str] = []
        total = 0.0
        for _ in range(5000):
            loads = {name: running.count(name) for name in names}
            running.append(choose(loads))  # type: ignore[operator]
            if len(running) > 8 * replicas:
                running.pop(rng.randrange(len(running)))
            total += max(running.count(name) for name in names) - len(running) / replicas
        return total / 5000

    assert excess(by_affinity) < 1.1 * excess(by_chance)


def asked(priority: int | None = 0) -> PendingRequest:
    """A call with a prompt, or one without."""
    args = [] if priority is None else [PreparedPrompt(np.arange(9, dtype=np.int32)), None, priority, "id", 1e12]
    return PendingRequest(args, {}, RequestMetadata("request", "internal", call_method="generate"))


async def test_requests_wait_in_order_of_priority_and_calls_without_a_prompt_are_first() -> None:
    subject = AffinityRouter(DeploymentID("LlavaModel", "llava"), DeploymentHandleSource.REPLICA)
    subject.initialize_state(slack=SLACK)
    first, batch, urgent, second, control, left = (asked(priority) for priority in (0, 1, -5, 0, None, 0))
    for each in (first, batch, urgent, second, control, left):
        subject._pending_requests_to_route.append(each)
    left.future.cancel()
    order = [subject._get_next_pending_request_to_route() for _ in range(6)]
    assert all(
        each is wanted for each, wanted in zip(order, (control, urgent, first, second, batch, None), strict=True)
    )


async def test_a_burst_counts_before_the_replicas_reply() -> None:
    tier = DeploymentID("LlavaModel", "llava")
    router = AffinityRouter(tier, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state(slack=SLACK)
    replica = ReplicaID("one", tier)
    for _ in range(3):
        router.on_send_request(replica)
    router.on_new_queue_len_info(replica, 1)  # it took the first while two were on their way
    assert router.load(replica) == 3
    router.on_new_queue_len_info(replica, 5)  # other processes call it, too
    assert router.load(replica) == 5
    router.on_new_queue_len_info(replica, 0)
    for left in (2, 1, 0, 0):
        router.on_request_completed(replica, "any")
        assert router.load(replica) == left


def with_metadata(**metadata: int) -> RunningReplica:
    """A replica of which nothing but its metadata is known."""
    replica = RunningReplica.__new__(RunningReplica)
    replica._replica_info = RunningReplicaInfo(
        ReplicaID("one", DeploymentID("LlavaModel", "llava")), None, None, None, "one", 256, replica_metadata=metadata
    )
    return replica


@pytest.mark.parametrize(
    ("engine", "most"),
    [
        (EngineOptions(max_num_seqs=32, max_waiting=128), 32 + 80),
        (EngineOptions(max_num_seqs=64, max_waiting=128), 64 + 96),
        (EngineOptions(max_num_seqs=64, max_waiting=0), 64 + 64),
    ],
)
async def test_a_replica_gets_what_its_own_engine_has_a_use_for(engine: EngineOptions, most: int) -> None:
    router = AffinityRouter(DeploymentID("LlavaModel", "llava"), DeploymentHandleSource.REPLICA)
    router.initialize_state(slack=SLACK)
    assert router.most(with_metadata(**{MOST_REQUESTS: most_requests(engine)})) == most
    assert router.most(with_metadata()) == sys.maxsize  # of another release
    router.initialize_state(slack=SLACK, max_per_replica=7)
    assert router.most(with_metadata(**{MOST_REQUESTS: most_requests(engine)})) == 7
