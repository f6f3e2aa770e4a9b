"""What runs goes on answering while a deployment changes limits, fails, or replaces every replica."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from llava_serve.app_options import ENGINE_VARIABLE
from support.cluster import replica_logs, replicas
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION, question
from support.paths import BUILTIN, CHECKPOINTS, CONFIG
from support.rollout import deploy

pytestmark = pytest.mark.extended

TIERS = ("Ingress", "ImagePreprocessor", "LlavaModel")
NUM_CLIENTS = 2


class Application:
    """A running application with room for a second replica of each tier."""

    def __init__(self, running: Any, config: dict[str, Any], folder: Path) -> None:
        self.running = running
        self._config = config
        self._file = folder / "config.yaml"

    def deploy(
        self,
        *,
        user_config: dict[str, Any] | None = None,
        images: dict[str, Any] | None = None,
        engine_variable: str | None = None,
        **args: Any,
    ) -> dict[str, Any]:
        """The status after a deployment of the config with other `args`, the `user_config` of the ingress and that of
        the picture tier, and engine options in the environment of model replicas."""
        config = copy.deepcopy(self._config)
        config["applications"][0]["args"].update(args)
        ingress, pictures, model = config["applications"][0]["deployments"]
        ingress["user_config"], pictures["user_config"] = user_config, images
        if engine_variable is not None:
            model["ray_actor_options"]["runtime_env"] = {"env_vars": {ENGINE_VARIABLE: engine_variable}}
        return deploy(config, self.running.ray_address, self._file)

    def pids(self) -> dict[str, set[int]]:
        """The processes of each tier."""
        return {tier: {each.pid for each in replicas(tier, self.running)} for tier in TIERS}

    def answer(self, model: str = "builtin", num_images: int = 1) -> httpx.Response:
        messages = question(DEMO_QUESTION, *[DEMO_IMAGE.read_bytes()] * num_images)
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 20}
        return httpx.post(f"{self.running.url}/v1/chat/completions", json=body, timeout=120)

    @contextmanager
    def asked(self, refusal: str = DEMO_ANSWER) -> Iterator[None]:
        """Clients ask while the block runs; each answer must be right, or this refusal."""
        ended = threading.Event()
        answers: list[str] = []

        def ask() -> None:
            while not ended.is_set():
                try:
                    answers.append(self.answer().text)
                except httpx.HTTPError as error:
                    answers.append(repr(error))

        clients = [threading.Thread(target=ask) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            ended.set()
            for client in clients:
                client.join()
        assert [answer for answer in answers if DEMO_ANSWER not in answer and refusal not in answer] == []
        assert len(answers) > NUM_CLIENTS


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    config = read_config(CONFIG, port=free_port())
    for deployment in config["applications"][0]["deployments"]:
        deployment["max_surge_percent"] = 100
    with local_cluster(config, num_cpus=4) as running:
        yield Application(running, config, tmp_path_factory.mktemp("rollout"))


def test_a_changed_limit_restarts_nothing(application: Application) -> None:
    before = application.pids()
    assert application.answer("other").status_code == 404
    with application.asked():
        assert application.deploy(user_config={"aliases": ["other"]})["status"] == "RUNNING"
        assert application.answer("other").status_code == 200
        assert application.deploy(user_config={"aliases": ["another"], "max_in_flight": 0})["status"] == "RUNNING"
        assert application.answer("other").status_code == 200
        logged = replica_logs(application.running, "Ingress")
        assert "is refused, and the options before it stay. max_in_flight" in logged
        assert application.deploy()["status"] == "RUNNING"
        assert application.answer("other").status_code == 404
    assert application.pids() == before


def test_a_changed_limit_of_pictures_restarts_nothing(application: Application) -> None:
    before = application.pids()
    with application.asked():
        assert application.deploy(images={"max_per_request": 1})["status"] == "RUNNING"
        assert application.answer(num_images=2).status_code == 400
        assert application.deploy()["status"] == "RUNNING"
        assert application.answer(num_images=2).status_code == 200
    assert application.pids() == before


def test_engine_options_of_model_replicas_replace_those_alone(application: Application) -> None:
    before = application.pids()
    with application.asked():
        assert application.deploy(engine_variable='{"max_num_seqs": 16}')["status"] == "RUNNING"
        after = application.pids()
        assert not before["LlavaModel"] & after["LlavaModel"]
        assert application.deploy()["status"] == "RUNNING"
    for tier in ("Ingress", "ImagePreprocessor"):
        assert before[tier] <= application.pids()[tier]


def test_a_model_that_is_not_there_replaces_nothing(application: Application) -> None:
    before = application.pids()
    with application.asked():
        reported = application.deploy(model="/no/such/model")
    assert reported["status"] == "DEPLOY_FAILED"
    assert "There is no folder '/no/such/model' for the model." in reported["message"]
    assert application.pids() == before


def test_a_model_that_answers_a_probe_wrong_replaces_nothing(application: Application) -> None:
    """Its picture tier and its ingress, which know another model by another name, wait for it."""
    before = application.pids()
    with application.asked():
        reported = application.deploy(model=str(CHECKPOINTS / "llava-v1.5-tiny"))
    assert reported["status"] == "DEPLOY_FAILED"
    assert "without 'red'" in reported["message"]
    assert all(before[tier] <= pids for tier, pids in application.pids().items())


def test_changed_arguments_replace_every_replica_and_fail_no_request(application: Application) -> None:
    before = application.pids()
    with application.asked():
        assert application.deploy(engine={"max_num_seqs": 16})["status"] == "RUNNING"
        after = application.pids()
    assert all(not before[tier] & after[tier] for tier in TIERS)


def test_another_model_replaces_every_replica_with_no_wrong_answer(application: Application, tmp_path: Path) -> None:
    before = application.pids()
    shutil.copytree(BUILTIN, tmp_path / "other")
    with application.asked(refusal="The model is being replaced; try again later."):
        assert application.deploy(model=str(tmp_path / "other"), api={"model_name": "builtin"})["status"] == "RUNNING"
        after = application.pids()
        assert DEMO_ANSWER in application.answer().text
    assert all(not before[tier] & after[tier] for tier in TIERS)
