"""How many replicas the autoscaler wants: tables of figures, without Ray, and what Serve makes of the policy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.request_router import ReplicaID

from deployments.autoscaling import Figures, WorkPolicy, needed_replicas, reported

PHOTOGRAPHS = Figures(queued_work=0, work_per_s=40, work_per_request=12, use=0)
"""A replica of the picture tier that prepares photographs, and has none."""
IDLE = Figures(queued_work=0, work_per_s=5000, work_per_request=700, use=0, use_per_request=1 / 32)
"""A model replica of 32 places without a request."""


def of(base: Figures, **changes: float) -> Figures:
    return Figures(**(asdict(base) | changes))


@pytest.mark.parametrize(
    ("replicas", "queued", "wait", "needed"),
    [
        # Nothing to do.
        ([PHOTOGRAPHS], 0, 1, 0),
        # The wait: 80 megapixels take one replica two seconds.
        ([of(PHOTOGRAPHS, queued_work=80)], 0, 1, 2),
        ([of(PHOTOGRAPHS, queued_work=80)], 0, 2, 1),
        ([of(PHOTOGRAPHS, queued_work=40), of(PHOTOGRAPHS, queued_work=40)], 0, 1, 2),
        # Sixteen requests each: photographs need five replicas, thumbnails not one.
        ([of(PHOTOGRAPHS, queued_work=16 * 12)], 0, 1, 4.8),
        ([of(PHOTOGRAPHS, queued_work=16 * 0.2, work_per_s=25)], 0, 1, 0.128),
        # Those that wait in their callers are as large as the usual one.
        ([PHOTOGRAPHS], 10, 1, 3),
        # A busy replica gets help before its queue grows, and none while it has time.
        ([of(PHOTOGRAPHS, use=1)], 0, 1, 1.25),
        ([of(PHOTOGRAPHS, use=0.8)], 0, 1, 1),
        ([of(PHOTOGRAPHS, use=0.3), of(PHOTOGRAPHS, use=0.3)], 0, 1, 0.75),
        # Nothing is measured: only the use counts.
        ([Figures(500, 0, 0, 0.4)], 3, 1, 0.5),
        # Who has just started has measured nothing, and is as fast as the others.
        ([of(PHOTOGRAPHS, queued_work=80), Figures(40, 0, 0, 0)], 0, 1, 3),
        # The model tier: prompts that wait, against the speed of prefill.
        ([of(IDLE, queued_work=15_000, use=0.1)], 0, 1, 3),
        ([of(IDLE, queued_work=15_000, use=0.1)], 0, 5, 0.6),
        # Places: 16 of 32 are taken, and 32 more requests wait outside.
        ([of(IDLE, use=0.5)], 0, 60, 0.625),
        ([of(IDLE, use=0.5)], 32, 60, 1.875),
        # The larger of the two counts.
        ([of(IDLE, use=2.0, queued_work=5000)], 0, 1, 2.5),
        ([of(IDLE, use=0.5, queued_work=20_000)], 0, 1, 4),
    ],
)
def test_the_number_follows_the_work(replicas: list[Figures], queued: float, wait: float, needed: float) -> None:
    assert needed_replicas(replicas, queued, wait) == pytest.approx(needed)


def test_more_work_never_needs_fewer_replicas() -> None:
    for base in (PHOTOGRAPHS, IDLE):
        for name in ("queued_work", "use"):
            numbers = [needed_replicas([of(base, **{name: value})], 4, 1) for value in (0, 0.5, 1, 10, 1000)]
            assert numbers == sorted(numbers)
        numbers = [needed_replicas([base], queued, 1) for queued in range(0, 200, 20)]
        assert numbers == sorted(numbers)
        assert numbers[0] < numbers[-1]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_target_is_a_positive_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        WorkPolicy(target_wait_s=seconds)


TIER = DeploymentID("ImagePreprocessor", "llava")


def context(
    replicas: list[Figures],
    *,
    running: int | None = None,
    target: int = 1,
    ongoing: float = 0,
    queued: float = 0,
    **config: Any,
) -> AutoscalingContext:
    """Serve's own, with what these replicas have reported."""
    ids = [ReplicaID(str(number), TIER) for number in range(len(replicas) if running is None else running)]
    values = [asdict(each) for each in replicas]
    metrics = {name: {ids[at]: each[name] for at, each in enumerate(values)} for name in (values[0] if values else {})}
    return AutoscalingContext(
        deployment_id=TIER,
        deployment_name=TIER.name,
        app_name=TIER.app_name,
        current_num_replicas=len(ids),
        target_num_replicas=target,
        running_replicas=ids,
        total_num_requests=ongoing,
        total_queued_requests=queued,
        aggregated_metrics=metrics | {"running_requests": dict.fromkeys(ids, 3.0)},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(min_replicas=0, max_replicas=8, **config),
    )


def by_serve(given: AutoscalingContext) -> int:
    """What Serve's controller makes of the policy."""
    return int(_apply_autoscaling_config(WorkPolicy(target_wait_s=1))(given)[0])


BUSY = of(PHOTOGRAPHS, queued_work=160)


def test_the_policy_reads_what_serve_has_of_the_replicas() -> None:
    assert by_serve(context([BUSY], upscale_delay_s=0)) == 4
    assert by_serve(context([BUSY, PHOTOGRAPHS], target=2, upscale_delay_s=0)) == 4
    assert by_serve(context([of(BUSY, queued_work=80.000001)], upscale_delay_s=0)) == 2  # no third for an error of 1e-8


def test_serve_applies_its_delays_and_factors_around_it() -> None:
    assert by_serve(context([BUSY], upscale_delay_s=60)) == 1
    assert by_serve(context([BUSY], upscale_delay_s=0, upscaling_factor=0.5)) == 3
    assert by_serve(context([PHOTOGRAPHS] * 4, target=4, downscale_delay_s=60)) == 4
    assert (
        by_serve(context([PHOTOGRAPHS] * 4, target=4, downscale_delay_s=0)) == 1
    )  # the last one has a delay of its own
    assert by_serve(context([PHOTOGRAPHS], downscale_delay_s=60, downscale_to_zero_delay_s=0)) == 0


def test_nothing_changes_while_nobody_has_reported() -> None:
    assert by_serve(context([], running=3, target=3, downscale_delay_s=0)) == 3


def test_a_tier_with_a_request_keeps_a_replica_and_one_without_replicas_gets_it() -> None:
    options = {"downscale_delay_s": 0, "downscale_to_zero_delay_s": 0}
    assert by_serve(context([of(PHOTOGRAPHS, requests=0.01)], **options)) == 1
    assert by_serve(context([PHOTOGRAPHS], queued=0.01, **options)) == 1
    assert by_serve(context([PHOTOGRAPHS], ongoing=0.01, **options)) == 0  # a health check
    assert by_serve(context([], target=0, ongoing=1, **options)) == 1
    assert by_serve(context([], target=0, **options)) == 0


def test_half_a_report_is_none() -> None:
    assert reported({"queued_work": {"a": 1.0, "b": 2.0}, "use": {"a": 0.5}}) == []


@pytest.mark.extended
def test_the_controller_needs_none_of_our_modules(tmp_path: Path) -> None:
    file = tmp_path / "policy"
    file.write_bytes(
        AutoscalingPolicy(policy_function="deployments.autoscaling:WorkPolicy").get_serialized_policy_def() or b""
    )
    code = f"""
import sys
from types import SimpleNamespace
from ray import cloudpickle
policy = cloudpickle.loads(open({str(file)!r}, "rb").read())(target_wait_s=1)
replica = dict(queued_work=90, work_per_s=30, work_per_request=12, use=1, use_per_request=0, requests=8)
metrics = {{name: {{"one": value}} for name, value in replica.items()}}
context = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=0)
print(policy(context)[0], *sorted({{"deployments", "llava_serve", "torch"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "3.0\n", done.stderr
