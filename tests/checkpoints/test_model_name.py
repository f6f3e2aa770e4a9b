"""One name of a model, whichever way it is asked for: by hub id, by folder, through Serve or in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.app import AppArgs
from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.model_name import model_name, name_for_templates, short_name
from llava_serve.cli import main
from llava_serve.model.llava import Llava
from support.api_server import PacedBackend, app_over, error_of
from support.variants import edit

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


@pytest.mark.parametrize("name", ["attempt-3", "llava-1.5-prompt-tuned", "acme-vqa-v0.3", "my-llama-2b-vqa"])
def test_a_name_that_only_looks_like_another_models_changes_nothing(name: str, llava_15: Path) -> None:
    spec = open_checkpoint(str(llava_15.rename(llava_15.with_name(name))))
    assert (spec.conv_mode, spec.notes) == ("llava_v1", ())


def test_a_name_against_the_files_is_reported(llava_15: Path, caplog: Any, capsys: Any) -> None:
    folder = llava_15.rename(llava_15.with_name("my-mistral-vicuna"))
    spec = open_checkpoint(str(folder))
    assert spec.conv_mode == "llava_v1"
    (note,) = spec.notes
    assert "though the name contains 'mistral'" in note
    Llava.load(spec)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"my-mistral-vicuna: {note}"
    ]
    assert main(["inspect", str(folder)]) == 0
    assert note in capsys.readouterr().out
    assert main(["inspect", "--json", str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["note"] == [note]
    assert printed["template"] == [f"llava_v1: {spec.conv_reason}"]


@pytest.mark.parametrize("refs", [True, False])
def test_a_repository_of_the_hubs_cache_is_its_snapshot(refs: bool, llava_15: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--llava-llama-2-tiny"
    snapshot = repository / "snapshots" / HASH
    snapshot.parent.mkdir(parents=True)
    edit(llava_15 / "config.json", mm_vision_tower=str(tmp_path / "clip-vit-tiny-56"))
    llava_15.rename(snapshot)
    if refs:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(HASH)
        (repository / "snapshots" / ("0" * 40)).mkdir()
    spec = open_checkpoint(str(repository))
    assert (spec.name, spec.path, spec.conv_mode) == ("org/llava-llama-2-tiny", snapshot, "llava_llama_2")


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
