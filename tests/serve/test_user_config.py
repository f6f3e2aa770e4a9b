"""A `user_config` changes limits without a restart; a wrong one is refused, and what was there before it stays."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments.app import AppArgs, build_app
from deployments.ingress import Ingress
from deployments.model import LlavaModel
from deployments.preprocessor import ImagePreprocessor
from deployments.tools.check_config import check
from deployments.tools.config import ConfigError, parse_config
from llava_serve.app_options import ENGINE_VARIABLE, LIVE_OPTIONS, AppOptions
from llava_serve.cli.serve_config import app_options
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import CheckpointError, Failure, RequestError
from llava_serve.types import ImagePart, Message, TextPart
from support.api_server import serving
from support.demo import DEMO_IMAGE
from support.paths import CONFIG

RANK = None
"""Serve passes the replica's; none of ours uses it."""


class NoTier:
    """A handle that is not called."""

    def options(self, **_: object) -> NoTier:
        return self


def ingress(**options: Any) -> Ingress:
    return Ingress("builtin", ApiOptions(**options), NoTier(), NoTier())


async def test_the_ingress_changes_its_keys_limits_and_names(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("web:sesame\n")
    subject = ingress(aliases=["old"], max_in_flight=1)
    await subject.reconfigure(None, RANK)
    with serving(subject.__serve_build_asgi_app__()) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as web:

            async def status(model: str, **headers: str) -> int:
                body = {"model": model, "messages": [], "max_tokens": 1}
                return (await web.post("/v1/chat/completions", json=body, headers=headers)).status_code

            assert (await status("old"), await status("new")) == (400, 400)  # no messages
            assert (await web.get("/version")).status_code == 200
            await subject.reconfigure({"api_keys_file": str(keys), "max_body_bytes": 10}, RANK)
            assert (await web.get("/version")).status_code == 401
            authorized = {"Authorization": "Bearer sesame"}
            assert await status("old", **authorized) == 413
            await subject.reconfigure({"api_keys_file": str(tmp_path / "none")}, RANK)  # refused
            assert await status("old", **authorized) == 413
            await subject.reconfigure(None, RANK)  # it has been removed
            assert await status("old") == 400


async def test_the_picture_tier_changes_its_limits_while_it_works(caplog: pytest.LogCaptureFixture) -> None:
    tier = ImagePreprocessor(ModelOptions(), ImageOptions(cache_bytes=0))
    await tier.reconfigure(None, RANK)

    async def prepared(count: int) -> object:
        asked = [Message("user", (*[ImagePart(DEMO_IMAGE.read_bytes())] * count, TextPart("What is this?")))]
        return await tier.prepare(asked, None, time.time() + 60)

    assert not isinstance(await prepared(2), Failure)
    before = [each for each in psutil.Process().children() if "decode_worker" in " ".join(each.cmdline())]
    assert before
    in_flight = [asyncio.create_task(prepared(2)) for _ in range(8)]
    await asyncio.sleep(0)
    await tier.reconfigure({"max_per_request": 1}, RANK)
    refused = await prepared(2)
    assert isinstance(refused, Failure)
    assert "at most 1" in str(refused.error)
    assert not [each for each in await asyncio.gather(*in_flight) if isinstance(each, Failure)]
    in_flight.clear()
    assert psutil.wait_procs(before, timeout=10)[1] == []  # they decoded within the limits before
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)  # on a cluster it does not propagate
    await tier.reconfigure({"max_per_request": -1}, RANK)
    logger.removeHandler(caplog.handler)
    assert "max_per_request must be 0 or more" in caplog.text
    description = await tier.describe()
    assert not isinstance(description, Failure)
    assert description.max_images == 1


async def test_the_model_tier_changes_its_queue() -> None:
    engine = EngineOptions(num_threads=1, kv_cache_bytes=64 << 20, max_num_seqs=4, max_waiting=8)
    model = await asyncio.to_thread(LlavaModel, ModelOptions(device="cpu"), engine)
    await model.reconfigure({"max_waiting": 2}, RANK)
    assert model._llm._loop.engine.validator.max_sequences == 6
    await model.reconfigure({"max_num_seqs": 2}, RANK)  # refused
    assert model._llm._loop.engine.validator.max_sequences == 6
    await model.reconfigure(None, RANK)
    assert model._llm._loop.engine.validator.max_sequences == 12


async def test_a_replica_does_not_start_with_other_options_than_the_config_says() -> None:
    with pytest.raises(RequestError, match="max_in_flite cannot change while the application runs; these can: alias"):
        await ingress().reconfigure({"max_in_flite": 3}, RANK)


def test_the_names_are_options_of_the_application() -> None:
    for live in LIVE_OPTIONS.values():
        assert live.names <= type(getattr(AppOptions(), live.section)).model_fields.keys()


def config_with(deployment: str, user_config: object) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    [named] = [each for each in config["applications"][0]["deployments"] if each["name"] == deployment]
    named["user_config"] = user_config
    return config


@pytest.mark.parametrize(
    ("deployment", "user_config", "fault"),
    [
        ("Ingress", {"max_in_flight": 3, "aliases": ["other"]}, None),
        ("Ingress", None, None),
        ("ImagePreprocessor", {"max_tiles": 2}, None),
        ("LlavaModel", {"max_waiting": 0}, None),
        ("Ingress", {"max_in_flite": 3}, ".max_in_flite: unknown; did you mean max_in_flight?"),
        ("Ingress", {"max_in_flight": 0}, ": max_in_flight must be 1 or more."),
        ("Ingress", {"api_keys": ["sesame"]}, ": api_keys cannot change while the application runs; these can: alias"),
        ("LlavaModel", {"max_num_seqs": 8}, ": max_num_seqs cannot change while the application runs; these can: max_"),
    ],
)
def test_the_check_knows_what_a_replica_would_refuse(deployment: str, user_config: object, fault: str | None) -> None:
    number = list(LIVE_OPTIONS).index(deployment)
    faults = check(config_with(deployment, user_config))
    if fault is None:
        assert faults == []
    else:
        [sentence] = faults
        assert sentence.startswith(f"applications[0].deployments[{number}].user_config{fault}")
        assert "sesame" not in sentence


def config_with_engine(said: str, deployment: str = "LlavaModel") -> dict[str, Any]:
    config = config_with(deployment, None)
    [named] = [each for each in config["applications"][0]["deployments"] if each["name"] == deployment]
    named["ray_actor_options"]["runtime_env"] = {"env_vars": {ENGINE_VARIABLE: said}}
    return config


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ('{"max_num_seqs": 8, "block_size": 32}', None),
        ('{"max_num_seqs": 0}', "max_num_seqs must be 1 or more."),
        ('{"max_num_seq": 8}', "max_num_seq is unknown."),
        ('{"max_model_len": 512}', "max_model_len concerns the picture tier, too; set it in args.engine."),
        ("[]", "it must be a text, a JSON object of engine options."),
        ("{max_num_seqs: 8}", "it must be a text, a JSON object of engine options."),
    ],
)
async def test_engine_options_of_model_replicas_are_checked(
    said: str, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"applications[0].deployments[2].ray_actor_options.runtime_env.env_vars.{ENGINE_VARIABLE}: "
    assert check(config_with_engine(said)) == ([] if fault is None else [path + fault])
    monkeypatch.setenv(ENGINE_VARIABLE, said)
    if fault is not None:
        with pytest.raises(RequestError, match=re.escape(f"{ENGINE_VARIABLE}: {fault}")):
            LlavaModel(ModelOptions(device="cpu"), EngineOptions())
        return
    engine = EngineOptions(num_threads=1, kv_cache_bytes=64 << 20, max_waiting=8)
    model = await asyncio.to_thread(LlavaModel, ModelOptions(device="cpu"), engine)
    assert model._llm._loop.engine.validator.max_sequences == 8 + 8
    assert app_options(config_with_engine(said), "mine.yaml", {}).engine.max_num_seqs == 8


def test_no_other_replicas_have_an_engine() -> None:
    [fault] = check(config_with_engine("{}", "Ingress"))
    assert fault.endswith(f"{ENGINE_VARIABLE}: only LlavaModel has an engine")


def test_a_server_in_one_process_has_the_options_too() -> None:
    """A file of keys that stood in a `user_config` alone would else let everyone in."""
    config = config_with("Ingress", {"api_keys_file": "/etc/keys", "max_in_flight": 3})
    options = app_options(config, "mine.yaml", {})
    assert (options.api.api_keys_file, options.api.max_in_flight, options.api.max_timeout_s) == ("/etc/keys", 3, 600)


def test_keys_of_the_command_replace_those_of_a_user_config(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    user_config = {"api_keys_file": str(tmp_path / "none"), "max_in_flight": 3}
    mine.write_text(yaml.safe_dump(config_with("Ingress", user_config)))
    with pytest.raises(ConfigError, match="none cannot be read"):
        parse_config(mine)
    (tmp_path / "keys").write_text("sesame\n")
    [application] = parse_config(mine, api_keys_file=str(tmp_path / "keys"))["applications"]
    assert application["deployments"][0]["user_config"] == {"max_in_flight": 3}


@pytest.mark.parametrize("model", ["/no/such/model", str(CONFIG.parent)])
def test_a_wrong_model_fails_the_build(model: str) -> None:
    with pytest.raises(CheckpointError):
        build_app(AppArgs(model=model))
