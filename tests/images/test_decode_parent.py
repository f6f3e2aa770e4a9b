"""Decoding processes and their parent: they end with it, find the library where it has it, and import little."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil

from support import odd_decoder
from support.api_server import wait_until
from support.demo import DEMO_IMAGE
from support.paths import CHECKPOINTS, ROOT

AT_ONCE_S = 30.0
"""Ending takes some milliseconds; a busy machine is given more."""

PARENT = """
import sys, threading
sys.path[:0] = sys.argv[1:3]
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.images.isolated import IsolatedDecoder

with open(sys.argv[4], "rb") as file:
    good = file.read()
decoder = IsolatedDecoder(ImageOptions(), open_checkpoint(sys.argv[3]).image, sys.argv[5])
assert len(decoder.tiles_of(good, 100_000).tiles) == 1
if sys.argv[6:]:
    threading.Thread(target=decoder.tiles_of, args=(b"sleep 60", 100_000), daemon=True).start()
    print("busy", flush=True)
    sys.stdin.read()
"""


def parent(library: Path, worker: str, *more: str) -> list[str]:
    paths = library, ROOT / "tests", CHECKPOINTS / "llava-v1.5-tiny", DEMO_IMAGE
    return [sys.executable, "-I", "-c", PARENT, *map(str, paths), worker, *more]


def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        parent(ROOT, odd_decoder.WORKER, "stay"), cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        children = psutil.Process(process.pid).children()
        assert len(children) == 2  # one at work, one spare
        process.kill()
    assert psutil.wait_procs(children, timeout=AT_ONCE_S)[1] == []
    wait_until(lambda: set(os.listdir("/dev/shm")) <= shared)  # those of other programs come and go


def test_the_library_may_lie_in_an_archive(tmp_path: Path) -> None:
    with zipfile.PyZipFile(str(tmp_path / "library.zip"), "w") as archive:
        archive.writepy(str(ROOT / "llava_serve"))
    command = parent(tmp_path / "library.zip", "llava_serve.images.decode_worker")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_imports_little() -> None:
    show = "import sys, llava_serve.images.decode_worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"numpy", "PIL"} <= set(done.stdout.split())
    assert not {"torch", "transformers", "ray", "requests"} & set(done.stdout.split())
