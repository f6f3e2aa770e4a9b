"""Autoscaling by work: how many replicas a tier needs for the work that waits in it, not for a number of requests.

A thumbnail and a photograph of 12 megapixels are one request each, and so are a question and a document of 8,000
tokens. So each replica measures and reports `Figures`, in megapixels or tokens, and `WorkPolicy` sums them up. Serve
applies the bounds, factors and delays of `autoscaling_config` around any policy; a tier without replicas starts one at
the first request, without asking the policy.

Serve pickles the policy by value and runs it in its controller: this module imports nothing but Python's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

MAX_USE = 0.8
"""Of a replica in the mean: beyond it, requests that arrive by chance at once wait for long."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a replica reports of itself: the dict of its `record_autoscaling_stats`.

    Work is counted in megapixels in the picture tier, and in positions of prompts, text and images, in the model tier.

    Attributes:
        queued_work: that is not done.
        work_per_s: what the replica does in a second while it has enough to do; 0 while nothing is measured.
        work_per_request: of a usual request; 0 while nothing is measured.
        use: share of the replica that is in use. In the model tier requests that wait count for the room that they
            will take, so it may be above 1.
        use_per_request: share that one more request will take, beside the time for its work.
        requests: that are not done, batch work included. No other figure has that: it takes what the others leave.
    """

    queued_work: float
    work_per_s: float
    work_per_request: float
    use: float
    use_per_request: float = 0.0
    requests: float = 0.0


def needed_replicas(replicas: Sequence[Figures], queued_requests: float, target_wait_s: float) -> float:
    """How many replicas keep the work's wait below a target, with no more than `MAX_USE` of each in use.

    Args:
        replicas: those that run and have reported; at least one.
        queued_requests: that wait in their callers, and that no replica knows of.
        target_wait_s: seconds after which work that arrives now is done.

    Returns:
        The number, not rounded. 0 if there is nothing to do.
    """
    use = sum(each.use for each in replicas) + queued_requests * _mean(replicas, "use_per_request")
    needed = use / MAX_USE
    if speed := _mean(replicas, "work_per_s"):
        work = sum(each.queued_work for each in replicas) + queued_requests * _mean(replicas, "work_per_request")
        needed = max(needed, work / speed / target_wait_s)
    return needed


def _mean(replicas: Sequence[Figures], name: str) -> float:
    """Of the replicas that have measured it."""
    measured = [value for each in replicas if (value := getattr(each, name))]
    return sum(measured) / len(measured) if measured else 0.0


class WorkPolicy:
    """Serve's policy for both tiers: `policy_function` in `autoscaling_config`, with `policy_kwargs`.

    Args:
        target_wait_s: seconds that work may wait in this tier. Those of both tiers are parts of the time to the first
            token.

    Raises:
        ValueError: `target_wait_s` is not a positive number.
    """

    def __init__(self, target_wait_s: float) -> None:
        if not 0 < target_wait_s < math.inf:
            raise ValueError("target_wait_s must be a positive number of seconds.")
        self._target_wait_s = target_wait_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas, which Serve rounds up, and no state."""
        replicas = reported(context.aggregated_metrics or {})
        if not replicas:  # they have just started, or the controller has
            return context.target_num_replicas, {}
        needed = needed_replicas(replicas, context.total_queued_requests, self._target_wait_s)
        # Serve's own count of requests has health checks, too: with it, no tier would ever have none.
        if any(each.requests for each in replicas) or context.total_queued_requests > 0:
            needed = max(needed, 1.0)
        return round(needed, 3), {}  # 2.0000001 would become 3


def reported(metrics: Mapping[str, Mapping[Any, float]]) -> list[Figures]:
    """The figures of all replicas.

    Args:
        metrics: as Serve has them, by name and replica; others than ours are ignored.
    """
    ours = [metrics.get(each.name, {}) for each in fields(Figures)]
    known = set(ours[0]).intersection(*ours[1:])
    return [Figures(*(values[replica] for values in ours)) for replica in known]
