"""A machine's GPU is used, or it is said that it is not."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.tools.check_config import check
from deployments.tools.config import parse_config
from deployments.tools.gpus import reserve_gpus, unused_gpus


def reserved(config: dict[str, Any]) -> list[float | None]:
    """GPUs that each deployment's replicas reserve."""
    return [one["ray_actor_options"].get("num_gpus") for one in config["applications"][0]["deployments"]]


def test_the_packaged_config_takes_a_gpu_where_there_is_one() -> None:
    config = parse_config()
    reserve_gpus(config, 0)
    assert reserved(config) == [None, None, None]
    reserve_gpus(config, 2)
    assert reserved(config) == [None, None, 1]
    assert check(config) == []


@pytest.mark.parametrize("number", [0, 0.5, 1])
def test_what_a_config_says_itself_stays(number: float) -> None:
    config = parse_config()
    config["applications"][0]["deployments"][2]["ray_actor_options"]["num_gpus"] = number
    reserve_gpus(config, 1)
    assert reserved(config) == [None, None, number]


def test_a_config_for_the_cpu_takes_no_gpu() -> None:
    config = parse_config()
    config["applications"][0]["args"]["device"] = "cpu"
    reserve_gpus(config, 1)
    assert reserved(config) == [None, None, None]
    assert unused_gpus(config, 1, ["cpu"]) is None


def test_a_gpu_that_no_replica_uses_is_warned_of() -> None:
    config = parse_config()
    warning = unused_gpus(config, 1, ["cpu"])
    assert warning is not None
    assert warning.startswith("This machine has 1 GPU(s), and the model runs on the CPU")
    assert unused_gpus(config, 1, ["cuda:0 (a GPU)"]) is None
    assert unused_gpus(config, 0, ["cpu"]) is None
