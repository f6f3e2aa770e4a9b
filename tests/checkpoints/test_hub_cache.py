"""Checkpoints from a hub: a server on this machine stands in for it, and its own client fetches and keeps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

MODEL = "someone/llava-tiny"
REVISION = "a" * 40
WEIGHTS = {".safetensors", ".bin"}
OPEN = """
import logging, sys
from llava_serve import checkpoints, errors
logging.basicConfig(level=logging.INFO)
try:
    spec = checkpoints.open_checkpoint(sys.argv[1], weights=sys.argv[2] != "description")
    print(spec if sys.argv[2] == "spec" else spec.path)
except errors.CheckpointError as error: print(error)
"""


@dataclass
class Hub:
    """Gives one repository by the hub's protocol.

    Attributes:
        folder: the repository's files.
        cache: of its client.
        given: names of the files that were downloaded.
        sizes: what it says of files, where that is not the truth.
        log: of the last call.
    """

    folder: Path
    cache: Path
    url: str = ""
    given: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    log: str = ""

    @property
    def snapshot(self) -> Path:
        """Where the client keeps the files."""
        return self.cache / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / REVISION

    def open(self, what: str, *, model: str = MODEL, offline: bool = False) -> str:
        """The checkpoint's folder or all of its description, or the error, in a process of its own: the client reads
        its settings when it is imported."""
        settings = {"HF_HOME": str(self.cache), "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": str(int(offline))}
        command = [sys.executable, "-c", OPEN, model, what]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
        self.log = done.stderr
        return done.stdout.strip()


@pytest.fixture
def hub(llava_15: Path, tmp_path: Path) -> Iterator[Hub]:
    edited = json.loads((llava_15 / "config.json").read_text())
    edited["mm_vision_tower"] = str((llava_15 / edited["mm_vision_tower"]).resolve())
    (llava_15 / "config.json").write_text(json.dumps(edited))
    there = Hub(llava_15, tmp_path / "cache")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0].lstrip("/")
            if path.startswith(f"api/models/{MODEL}/revision"):
                self.reply(json.dumps({"id": MODEL, "sha": REVISION, "siblings": []}).encode())
            elif path.startswith(f"api/models/{MODEL}/tree"):
                self.reply(json.dumps([entry(file) for file in sorted(there.folder.iterdir())]).encode())
            elif path.startswith(f"{MODEL}/resolve"):
                name = path.rsplit("/", 1)[1]
                if self.command == "GET":
                    there.given.append(name)
                self.reply((there.folder / name).read_bytes(), there.sizes.get(name))
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 (the server's own naming)

        def reply(self, body: bytes, size: int | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(size or len(body)))
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{oid(body)}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield there
    server.shutdown()
    server.server_close()
    thread.join()


def oid(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


def entry(file: Path) -> dict[str, object]:
    body = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(body), "oid": oid(body)}


def kept(hub: Hub) -> set[str]:
    return {file.suffix for file in hub.snapshot.iterdir()}


def test_the_description_is_fetched_without_the_weights_and_they_are_fetched_when_asked_for(hub: Hub) -> None:
    assert Path(hub.open("description")) == hub.snapshot
    assert not kept(hub) & WEIGHTS
    assert not [name for name in hub.given if Path(name).suffix in WEIGHTS]
    assert Path(hub.open("description", offline=True)) == hub.snapshot
    # What was kept for one tier does not count as whole for the other.
    message = hub.open("weights", offline=True)
    assert f"{MODEL!r} is only partly in the local hub cache" in message
    assert Path(hub.open("weights")) == hub.snapshot
    assert kept(hub) & WEIGHTS
    hub.given.clear()
    assert Path(hub.open("weights", offline=True)) == Path(hub.open("weights")) == hub.snapshot
    assert not hub.given


def test_the_size_is_shown_before_the_download_and_the_progress_while_it_lasts(hub: Hub) -> None:
    hub.open("weights")
    size = sum(file.stat().st_size for file in hub.snapshot.iterdir())
    files = len(list(hub.snapshot.iterdir()))
    assert f"Downloading {MODEL}: {size / 1e6:.1f} MB in {files} files, to {hub.cache}" in hub.log
    assert f"{files}/{files}" in hub.log  # of the progress bar
    hub.open("weights")
    assert "Downloading" not in hub.log


def test_a_download_that_the_disk_cannot_hold_is_refused_before_it_begins(hub: Hub) -> None:
    hub.sizes["pytorch_model-00002-of-00002.bin"] = 10**15
    assert hub.open("description") == str(hub.snapshot)
    hub.given.clear()
    message = hub.open("weights")
    assert message.startswith(f"The model {MODEL!r} needs 1000000.0 GB of disk, and {hub.cache}/hub has ")
    assert "HF_HOME" in message
    assert not kept(hub) & WEIGHTS


def test_a_second_copy_of_the_weights_stays_on_the_hub(hub: Hub) -> None:
    (hub.folder / "model.safetensors").write_bytes(b"not read here")
    hub.sizes["pytorch_model-00002-of-00002.bin"] = 10**15
    assert hub.open("weights") == str(hub.snapshot)
    assert "model.safetensors" in hub.given
    assert not [name for name in hub.given if name.startswith("pytorch_model-")]
    assert hub.open("weights", offline=True) == str(hub.snapshot)


@pytest.mark.parametrize("gap", ["config.json", "tokenizer.model"])
def test_a_gap_is_reported_offline_and_filled_online(hub: Hub, gap: str) -> None:
    hub.open("description")
    (hub.snapshot / gap).unlink()
    assert "only partly in the local hub cache" in hub.open("description", offline=True)
    assert Path(hub.open("description")) == hub.snapshot
    assert (hub.snapshot / gap).is_file()


@pytest.mark.parametrize("gap", ["config.json", "pytorch_model-00002-of-00002.bin"])
def test_a_gap_shows_in_a_cache_without_a_listing(hub: Hub, gap: str) -> None:
    """Older clients kept none."""
    shutil.copytree(hub.folder, hub.snapshot)
    (hub.snapshot.parent.parent / "refs").mkdir()
    (hub.snapshot.parent.parent / "refs" / "main").write_text(REVISION)
    assert Path(hub.open("weights", offline=True)) == hub.snapshot
    (hub.snapshot / gap).unlink()
    assert "only partly in the local hub cache" in hub.open("weights", offline=True)
    assert Path(hub.open("weights")) == hub.snapshot
    assert set(hub.given) == {gap}


def test_a_hub_id_and_its_folder_give_the_same_description(hub: Hub) -> None:
    by_id = hub.open("spec")
    assert f"name='{MODEL}'" in by_id
    assert hub.open("spec", model=str(hub.snapshot)) == by_id
    plain = shutil.copytree(hub.snapshot, hub.cache.parent / MODEL.split("/")[1])
    by_folder = hub.open("spec", model=str(plain))
    assert by_folder == by_id.replace(str(hub.snapshot), str(plain)).replace(MODEL, plain.name)


def test_a_hub_id_decides_the_template(hub: Hub) -> None:
    named = hub.cache / "hub" / "models--org--llava-llama-2-tiny" / "snapshots" / REVISION
    hub.open("weights")
    shutil.copytree(hub.snapshot, named)
    (named.parent.parent / "refs").mkdir()
    (named.parent.parent / "refs" / "main").write_text(REVISION)
    assert "conv_mode='llava_llama_2'" in hub.open("spec", model="org/llava-llama-2-tiny", offline=True)
