"""Cache-aware routing to the model replicas: prefers the one that has cached the image or the conversation. A replica
gets no more requests in advance than it soon begins; the others wait here, by priority.

`serve_config.yaml` names the router for `LlavaModel`. It runs in each process that calls the model tier, and knows the
calls of that process only; for new keys all processes agree, since they rank the replicas in the same order.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from cachetools import LRUCache
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from llava_serve.config import EngineOptions, RoutingOptions
from llava_serve.types import PreparedPrompt

LEADING_TOKENS = 128
"""That identify a conversation without images: more than the template's system message, which all share. A shorter one
gets another key with its next turn, which costs no more than computing these few tokens again."""

REMEMBERED_KEYS = 4096
"""More images than the caches of many replicas hold."""

MOST_REQUESTS = "most_requests"
"""What a replica says of itself when it starts: so many requests have a use for it."""


def most_requests(engine: EngineOptions) -> int:
    """A batch of online requests, beside all the batch work that the engine takes."""
    return engine.max_num_seqs + engine.max_batch_sequences


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # ray is not typed
    """Routes Serve's calls to the model tier, by `Affinity`.

    Serve pickles the class by value: the process that builds the application needs this module, and every process that
    calls the model tier needs the modules that it imports.
    """

    _pending_requests_to_route: deque[PendingRequest]
    """Serve's: those that wait for a choice."""

    queue_len_response_deadline_s = 1.0
    """A busy replica responds late; with Serve's 0.1 s the request would go to a replica that has nothing cached."""

    def initialize_state(self, **options: int) -> None:
        """Called by Serve with the config's `request_router_kwargs`: the fields of `RoutingOptions`."""
        routing = RoutingOptions(**options)
        self._affinity = Affinity(routing.slack)
        self._max_per_replica = routing.max_per_replica
        self._in_flight: Counter[ReplicaID] = Counter()

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._in_flight[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called once for each call, also for one that could not be sent: hence never below 0."""
        if self._in_flight[replica_id] > 1:
            self._in_flight[replica_id] -= 1
        else:
            del self._in_flight[replica_id]

    def load(self, replica_id: ReplicaID) -> int:
        """Requests of a replica: what it last said, and at least this process's own.

        Serve's cache alone is too low in a burst: each reply overwrites it with how many the replica had when it took
        that call, and those still on their way are lost from the count.
        """
        return max(self.replica_queue_len_cache.get(replica_id) or 0, self._in_flight[replica_id])

    def most(self, replica: RunningReplica) -> int:
        """Requests that a replica gets: as the config says, or as the replica itself does. Its engine may have other
        limits than the config's `args`, and one of another release says nothing."""
        if self._max_per_replica is not None:
            return self._max_per_replica
        return int(replica.replica_metadata.get(MOST_REQUESTS, sys.maxsize))

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then all others; Serve takes the least loaded of these if the chosen one is full. None of
        them where each has enough to do: Serve asks again."""
        await asyncio.sleep(0)  # calls that were routed just before are sent now, and so count in the loads
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        if pending_request is None or not replicas:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # if all are at capacity: Serve does not wait by itself
        loads = {name: self.load(each.replica_id) for name, each in replicas.items()}
        if prompt_of(pending_request) is not None:  # other calls cost nothing
            loads = {name: load for name, load in loads.items() if load < self.most(replicas[name])}
            if not loads:
                await self._probe_queue_lens(list(replicas.values()), 0)  # other processes' requests may have ended
                return []
            replicas = {name: replicas[name] for name in loads}
        first = self._affinity.choose(key_of(pending_request), loads)
        return [[replicas.pop(first)], list(replicas.values())]

    def _get_next_pending_request_to_route(self) -> PendingRequest | None:
        """The smallest priority number is next, as in the engine, and of equals the one that came first."""
        waiting = [each for each in self._pending_requests_to_route if not each.future.done()]
        first = min(waiting, key=priority_of, default=None)
        self._pending_requests_to_route: deque[PendingRequest] = deque(each for each in waiting if each is not first)
        return first

    def _get_pending_request_matching_internal_request_id(self, request_metadata: object) -> PendingRequest | None:
        """The request that the choice is for. Serve's own method looks for its id, which all calls from one request to
        another deployment share: of two at once, the second would never be sent."""
        waiting = (each for each in self._pending_requests_to_fulfill if each.metadata is request_metadata)
        return next((each for each in waiting if not each.future.done()), None)


class Affinity:
    """Remembers which replicas have cached a key, and chooses one. It is independent of Ray.

    A new key goes to the less loaded of two replicas: the power of two choices, as in Serve's default, except that
    the key selects the two, not chance. So new keys are spread as by default, and processes that do not communicate
    choose among the same two.

    Args:
        slack: how many requests more than the least loaded replica one may have, and still get what it has cached.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._replicas: LRUCache[str, set[str]] = LRUCache(REMEMBERED_KEYS)

    def choose(self, key: str | None, loads: Mapping[str, int]) -> str:
        """Chooses the replica for a key, and remembers it.

        Args:
            key: identifies the prompt's beginning in the caches; None is a call without a prompt.
            loads: requests of each replica; not empty.
        """
        if key is None:
            return min(random.sample(list(loads), min(2, len(loads))), key=loads.__getitem__)
        bound = min(loads.values()) + self._slack
        ranked = sorted(loads, key=lambda replica: score(key, replica))
        known = self._replicas.get(key, set()) & loads.keys()
        fit = [replica for replica in ranked if replica in known and loads[replica] <= bound]
        fit = fit or [replica for replica in ranked[:2] if loads[replica] <= bound] or ranked
        chosen = min(fit, key=loads.__getitem__)  # the first of equals
        self._replicas[key] = known | {chosen}
        return chosen


def key_of(request: PendingRequest) -> str | None:
    """The routing key of a call's prompt: its first image's digest, or else that of its first tokens and its salt.

    The prompt is an argument of the call, which this process has anyway. None if the call has no prompt.
    """
    if (prompt := prompt_of(request)) is None:
        return None
    if prompt.digests:
        return prompt.digests[0]
    leading = prompt.token_ids[:LEADING_TOKENS].tobytes()
    return blake2b(leading + prompt.cache_salt.encode(), digest_size=16).hexdigest()


def prompt_of(request: PendingRequest) -> PreparedPrompt | None:
    """The prompt of a call of `LlavaModel.generate`; other methods have none."""
    first = request.args[0] if request.args else None
    return first if isinstance(first, PreparedPrompt) else None


def priority_of(request: PendingRequest) -> float:
    """That of a call of `LlavaModel.generate`, (prepared, sampling, priority, ...); other calls come before all."""
    return -math.inf if prompt_of(request) is None else float(request.args[2])


def score(key: str, replica: str) -> bytes:
    """The score of a replica for a key, lowest first (rendezvous hashing): independent of the other replicas."""
    return blake2b(f"{key} {replica}".encode(), digest_size=8).digest()
