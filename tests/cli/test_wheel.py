"""The wheel, installed by pip into an environment of its own and used from a folder that is not the repository."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llava_serve import __version__
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question
from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEY = secrets.token_hex(16)
ANSWER = "The circle is red."
NO_RAY = "Ray Serve is not installed: pip install 'llava-serve[serve]'."

RAY_DATA = f"""
import ray
from llava_serve.client import LlavaClient

class Ask:
    def __init__(self):
        self.client = LlavaClient()

    def __call__(self, row):
        return {{"answer": self.client.ask(row["picture"], {DEMO_QUESTION!r})}}

ray.init(address="auto", log_to_driver=False)
rows = ray.data.from_items([{{"picture": {str(DEMO_IMAGE)!r}}}] * 3)
print(rows.map(Ask, num_cpus=0, concurrency=1).to_pandas()["answer"].tolist())
"""


class Installed:
    """An environment with the wheel.

    Args:
        folder: gets the environment, and a working directory that has a package `deployments` of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.scripts = folder / "venv" / "bin"
        self.cwd = folder / "work"
        (self.cwd / "deployments").mkdir(parents=True)
        (self.cwd / "deployments" / "__init__.py").write_text("raise RuntimeError('This is not llava-serve.')\n")
        (self.cwd / "keys").write_text(f"{KEY}\n")
        (self.wheel,) = build_wheel(folder)
        venv.create(folder / "venv", with_pip=True)

    def install(self, extras: str = "") -> None:
        """Gets the rest from the index, at the versions of `constraints.txt`."""
        constraints = str(ROOT / "constraints.txt")
        done = self.run("pip", "install", "--quiet", "-c", constraints, f"{self.wheel}{extras}", timeout=600)
        assert done.returncode == 0, done.stderr

    def run(self, name: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment to its end."""
        command = [str(self.scripts / name), *arguments]
        return subprocess.run(
            command, cwd=self.cwd, env=environment(), capture_output=True, text=True, check=False, timeout=timeout
        )

    @contextmanager
    def serving(self, *arguments: str, **variables: str) -> Iterator[list[str]]:
        """Runs `llava-serve serve`, and gives what it has printed when it serves; then interrupts it."""
        command = [str(self.scripts / "llava-serve"), "serve", *arguments]
        with subprocess.Popen(
            command, cwd=self.cwd, env=environment() | variables, stdout=subprocess.PIPE, text=True, process_group=0
        ) as process:
            assert process.stdout is not None
            try:
                printed: list[str] = []
                for line in process.stdout:
                    printed.append(line)
                    if line.startswith("Other Ray jobs" if variables else "Serving "):
                        break
                assert any(line.startswith("Serving ") for line in printed), printed
                yield printed
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=120)
                assert process.returncode == 0
            finally:
                process.kill()


def environment() -> dict[str, str]:
    """Of a shell that knows neither the repository nor a Ray."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("RAY_")}


def build_wheel(folder: Path) -> Iterator[Path]:
    """Of a copy: the build leaves files behind."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "serve_config.yaml", "production.env"):
        shutil.copy(ROOT / name, source)
    for name in ("llava_serve", "deployments"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=300)
    return folder.glob("*.whl")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Without extras."""
    installed = Installed(tmp_path_factory.mktemp("installed"))
    installed.install()
    return installed


@pytest.fixture(scope="module")
def with_ray(library: Installed) -> Installed:
    """With what Ray Serve and Ray Data need. The tests before it have none of that."""
    library.install("[serve,data]")
    return library


def test_the_library_needs_no_ray(library: Installed) -> None:
    assert "ray is not installed" in library.run("llava-serve", "--version").stdout
    done = library.run("llava-serve", "ask", "--image", str(DEMO_IMAGE), "--temperature", "0", DEMO_QUESTION)
    assert (done.stdout, done.stderr) == (f"{ANSWER}\n", "")
    assert re.search(r"^name +builtin$", library.run("llava-serve", "inspect").stdout, re.MULTILINE)


def test_without_ray_one_sentence_says_what_to_install(library: Installed) -> None:
    done = library.run("llava-serve", "serve", "--port", "0")
    assert (done.returncode, done.stderr) == (2, f"llava-serve: {NO_RAY}\n")
    done = library.run("python", "-c", "from llava_serve.client import LlavaClient")
    assert done.stderr.splitlines()[-1] == f"ImportError: {NO_RAY}"


def test_without_ray_it_serves_in_process(library: Installed) -> None:
    with library.serving("builtin", "--in-process", "--port", "0", "--api-key-file", "keys") as printed:
        check_answer(printed[-1].split(" on ")[1].split()[0])


def test_it_tells_its_versions(with_ray: Installed) -> None:
    printed = with_ray.run("llava-serve", "--version").stdout
    assert re.fullmatch(rf"llava-serve {re.escape(__version__)}\ntorch 2\.\S+\nray 2\.\S+\n", printed)


def test_the_packaged_config_can_be_printed_and_served_from_a_file(with_ray: Installed) -> None:
    printed = with_ray.run("llava-serve", "serve", "--print-config").stdout
    assert "import_path: llava_serve_deployments.app:build_app" in printed
    assert not re.search(r"\bdeployments\.[a-z]", printed)
    (with_ray.cwd / "mine.yaml").write_text(printed)
    assert with_ray.run("python", "-m", "llava_serve_deployments.tools.check_config", "mine.yaml").returncode == 0
    (with_ray.cwd / "typo.yaml").write_text(printed.replace("num_replicas", "num_replica"))
    done = with_ray.run("llava-serve", "serve", "typo.yaml", "--port", "0")
    assert done.returncode == 2
    assert "did you mean num_replicas?" in done.stderr


def test_a_config_of_the_repository_is_reported_the_packages_name(with_ray: Installed) -> None:
    done = with_ray.run("llava-serve", "serve", str(ROOT / "serve_config.yaml"), "--port", "0")
    assert done.returncode == 2
    assert done.stderr.endswith("this installation has the application as llava_serve_deployments.app:build_app.\n")


def test_it_serves_on_ray_where_deployments_is_somebody_elses(with_ray: Installed) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with with_ray.serving("--port", "0", "--api-key-file", "keys", **token) as printed:
        check_answer(printed[-2].split(" on ")[1].split()[0])
        job = token | {"RAY_ADDRESS": printed[-1].strip().partition("RAY_ADDRESS=")[2]}
        done = subprocess.run(
            [with_ray.scripts / "python", "-c", RAY_DATA],
            cwd=with_ray.cwd,
            env=environment() | job,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.stdout.splitlines()[-1:] == [str([ANSWER] * 3)], done.stderr
        logs = Path(printed[-2].split("log: ")[1].strip().removesuffix(")")).parent
        written = [path.read_bytes() for path in logs.rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(b"api_keys_file" in text for text in written)  # Ray logs the arguments
        assert not any(KEY.encode() in text for text in written)


def check_answer(url: str) -> None:
    """The right answer with the key, and none without it."""
    asked = {"model": "builtin", "temperature": 0, "messages": question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())}
    assert httpx.post(f"{url}/v1/chat/completions", json=asked).status_code == 401
    header = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=header, timeout=120)
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
