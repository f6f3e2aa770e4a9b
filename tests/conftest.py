"""What tests share: one real Serve application on a Ray of its own, the official client to ask it, and tiny models.

It imports neither torch nor Ray until a fixture needs them: many tests do without.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.paths import CONFIG
from support.picture_server import PICTURE, PictureServer, picture_server, response

# Ray reads them when it is first imported: this process joins the application's Ray as another job.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# After a test's Ray has ended, Serve's threads in this process must not start another.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
# A shell starts what runs in the background with SIGINT ignored, and all that the tests start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """The million objects of the imported libraries stay to the end: no later collection looks at them again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes that test, one has all that starts a Ray cluster; else each takes the next file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "ray" if file.startswith(("tests/serve/", "tests/test_readme.py")) else file

    return Scheduler(config, log)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> None:
    """Products of tiny models on several threads mostly wait for threads. An engine before may have set its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def served() -> Iterator[Any]:
    """The application of the real `serve_config.yaml` on a Ray of two CPUs; only the port differs."""
    from deployments.tools.config import read_config
    from deployments.tools.local_cluster import free_port, local_cluster

    with local_cluster(read_config(CONFIG, port=free_port()), num_cpus=2) as running:
        yield running


@pytest.fixture(scope="session")
def ray_job(served: Any) -> Iterator[None]:
    """Makes this process a Ray job on the application's cluster."""
    import ray

    ray.init(address=served.ray_address, log_to_driver=False, logging_level="ERROR")
    yield
    # Serve's threads in this process outlive `ray.shutdown`, and would complain into streams that pytest has closed.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    ray.shutdown()


@pytest.fixture
def engine_stats(ray_job: None) -> Callable[[], dict[str, Any]]:
    """Reads the engine's statistics from the model replica."""
    from ray import serve

    handle = serve.get_deployment_handle("LlavaModel", "llava")
    return lambda: handle.stats.remote().result(timeout_s=30)


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    """The official client; without retries, so that no error is hidden."""
    from openai import OpenAI

    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as openai:
        yield openai


@pytest.fixture
def server() -> Iterator[PictureServer]:
    """An HTTP server that has one picture, and calls it something else."""
    with picture_server({"/a.png": response(PICTURE, "Content-Type: text/html")}) as running:
        yield running


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Waits for a condition that must hold soon, with a timeout that only a fault reaches."""
    from support.api_server import wait_until as wait

    return wait


def copy(name: str, folder: Path) -> Path:
    """Copies a golden checkpoint."""
    from support import variants

    return variants.copy(name, folder)


@pytest.fixture
def llava_15(tmp_path: Path) -> Path:
    return copy("llava-v1.5-tiny", tmp_path)


@pytest.fixture
def llava_16(tmp_path: Path) -> Path:
    return copy("llava-v1.6-vicuna-tiny", tmp_path)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    copy("vicuna-v1.5-tiny", tmp_path)
    return copy("llava-v1.5-tiny-lora", tmp_path)


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    copy("vicuna-v1.5-tiny", tmp_path)
    return copy("llava-v1-tiny-pretrain-projector", tmp_path)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model once, when it is first asked for."""

    from support.tiny_hf import FAMILY, MODELS, write_model

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("hf") / name
        write_model(folder, (MODELS | FAMILY)[name])
        return folder

    return write


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser for the tests of the page. It ends with its module: its event loop is in the way of others."""
    from support.browser import CHROMIUM, chromium

    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome, and there is none")
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab with a profile of its own, which must stay free of faults."""
    from support.browser import watched

    with browser.new_context() as context, watched(context.new_page()) as opened:
        yield opened
