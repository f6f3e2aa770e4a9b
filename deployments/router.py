"""Which model replica answers: the one that has seen the picture or the conversation, unless it has much more to do.

`serve_config.yaml` names it for `LlavaModel`. It runs in each process that calls the model tier, and knows what went
through that process; several of them agree as far as they can, since they rank the replicas alike for each key.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from cachetools import LRUCache
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from llava_serve.config import RoutingOptions
from llava_serve.types import PreparedPrompt

LEADING_TOKENS = 128
"""Of a conversation without pictures: beyond the template's system message, which all share. One that is shorter gets
another key with its next turn, which costs no more than computing these few again."""

REMEMBERED_KEYS = 4096
"""More pictures than the caches of many replicas hold."""


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # ray is not typed
    """Serve's routing of calls to the model tier, by `Affinity`.

    Serve hands it on by value: the process that builds the application must have this module, and all that call the
    model tier must have what it imports.
    """

    queue_len_response_deadline_s = 1.0
    """An engine at work answers late, and Serve's 0.1 s would send the request away from what it has seen."""

    def initialize_state(self, **options: int) -> None:
        """Called by Serve with the config's `request_router_kwargs`: the fields of `RoutingOptions`."""
        self._affinity = Affinity(RoutingOptions(**options).slack)

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then all others; Serve takes the least loaded of them if the chosen one is full."""
        await asyncio.sleep(0)  # what was chosen just before is sent now, and so counts in the loads
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        if pending_request is None or not replicas:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # if all are full: Serve does not wait by itself
        loads = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in replicas.items()}
        first = self._affinity.choose(key_of(pending_request), loads)
        return [[replicas.pop(first)], list(replicas.values())]

    def _get_pending_request_matching_internal_request_id(self, request_metadata: object) -> PendingRequest | None:
        """The request that a choice was made for. Serve's own looks for its id, which all calls from one request to
        another deployment share: of two at once, the second would never be sent."""
        waiting = (each for each in self._pending_requests_to_fulfill if each.metadata is request_metadata)
        return next((each for each in waiting if not each.future.done()), None)


class Affinity:
    """Remembers which replica was given what, and chooses. Knows nothing of Ray.

    A key that is new goes to one of two replicas, to the less loaded: the power of two choices, which is also Serve's
    default, but that the key and not chance names the two. So new keys are spread as by default, and processes that
    do not know of each other choose among the same two.

    Args:
        slack: requests that a replica may have above the least loaded one, and still get what it has seen.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._replicas: LRUCache[str, set[str]] = LRUCache(REMEMBERED_KEYS)

    def choose(self, key: str | None, loads: Mapping[str, int]) -> str:
        """Returns the replica that is to work on the key, and remembers it.

        Args:
            key: what the caches would know the prompt by; None is a call that no cache helps.
            loads: requests in each replica; of one at least.
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
    """Names what caches may have of a call's prompt: its first picture, or else how the conversation begins.

    The prompt is the call's own argument, which is in this process anyway. None where the call has none.
    """
    for argument in request.args:
        if isinstance(argument, PreparedPrompt):
            if argument.digests:
                return argument.digests[0]
            return blake2b(argument.token_ids[:LEADING_TOKENS].tobytes(), digest_size=16).hexdigest()
    return None


def score(key: str, replica: str) -> bytes:
    """The lower, the more a key belongs to a replica (rendezvous hashing): independent of the other replicas."""
    return blake2b(f"{key} {replica}".encode(), digest_size=8).digest()
