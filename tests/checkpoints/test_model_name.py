"""One name of a model, whichever way it is asked for: by hub id, by folder, through Serve or in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.app import AppArgs
from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.model_name import model_name, name_for_templates, short_name
from support.api_server import PacedBackend, app_over, error_of

HASH = "4481d270cc22fd5c4d1bb5df129622006ccd9234"


@pytest.mark.parametrize(
    ("written", "name", "short", "for_templates"),
    [
        ("builtin", "builtin", "builtin", "builtin"),
        ("org/llava-llama-2-7b", "org/llava-llama-2-7b", "llava-llama-2-7b", "llava-llama-2-7b"),
        ("org/checkpoint-7b", "org/checkpoint-7b", "checkpoint-7b", "checkpoint-7b"),
        ("/models/llava-v1.5-13b/", "llava-v1.5-13b", "llava-v1.5-13b", "llava-v1.5-13b"),
        ("~/llava-v1.5-13b", "llava-v1.5-13b", "llava-v1.5-13b", "llava-v1.5-13b"),
        ("/runs/llava-v1.6-34b/checkpoint-500", "llava-v1.6-34b/checkpoint-500", "checkpoint-500", "llava-v1.6-34b"),
        ("/cache/models--org--llava-mpt/snapshots/" + HASH, "org/llava-mpt", "llava-mpt", "llava-mpt"),
        ("/cache/models--org--a--b/snapshots/" + HASH, "org/a--b", "a--b", "a--b"),
        ("/cache/models--org--llava-mpt", "org/llava-mpt", "llava-mpt", "llava-mpt"),
    ],
)
def test_a_name_is_made_of_what_was_written(written: str, name: str, short: str, for_templates: str) -> None:
    assert model_name(written) == name
    assert short_name(name) == short
    assert name_for_templates(name) == for_templates


def test_a_relative_folder_has_the_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoint-500"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert model_name(".") == "run/checkpoint-500"
    monkeypatch.chdir(tmp_path)
    assert model_name("run/checkpoint-500") == "run/checkpoint-500"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert model_name("org/name") == "name"  # a folder, though it looks like a hub id


def test_a_link_keeps_the_name_that_was_written(llava_15: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(llava_15)
    assert model_name(str(tmp_path / "current")) == "current"
    assert open_checkpoint(str(tmp_path / "current")).name == "current"


def test_serve_and_the_description_have_one_name(llava_15: Path) -> None:
    step = llava_15.rename(llava_15.parent / "checkpoint-500")
    spec = open_checkpoint(str(step))
    assert spec.name == f"{step.parent.name}/checkpoint-500" == AppArgs(model=str(step)).model_name


def test_a_training_step_gets_the_template_of_its_run(llava_15: Path, tmp_path: Path) -> None:
    run = tmp_path / "llava-llama-2-tuned"
    run.mkdir()
    llava_15.with_name("clip-vit-tiny-56").rename(run / "clip-vit-tiny-56")
    spec = open_checkpoint(str(llava_15.rename(run / "checkpoint-20")))
    assert spec.conv_mode == "llava_llama_2"


def test_requests_may_use_the_last_segment() -> None:
    with app_over(PacedBackend(model_name="org/llava-tiny")) as web:
        assert [model["id"] for model in web.get("/v1/models").json()["data"]] == ["org/llava-tiny"]
        assert web.get("/v1/models/org/llava-tiny").json() == web.get("/v1/models/llava-tiny").json()
        for model in ("org/llava-tiny", "llava-tiny"):
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
            answer = web.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["model"]) == (200, "org/llava-tiny")
        refused = web.post("/v1/chat/completions", json={**body, "model": "tiny"})
        assert (refused.status_code, error_of(refused)["param"]) == (404, "model")
