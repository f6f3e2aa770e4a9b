"""The clients of others that drive a running server, each installed in an environment of its own.

The one table of them: tests/clients runs it, and docs/clients.md shows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.demo import DEMO_IMAGE
from support.paths import BUILTIN, TESTS

DRIVERS = TESTS / "clients" / "drivers"
INSTALL_S = 900.0
RUN_S = 400.0

TORCH = "torch==2.13.0"
"""Of any build, as in constraints.txt, so that an index with the CPU build is enough."""
ZOD = "zod@4.6.7"


@dataclass(frozen=True)
class Client:
    """A client, and what is tried with it.

    Attributes:
        name: as people know it.
        driver: the file that uses it; `.mjs` runs under Node.
        packages: what is installed, at one version each; the client itself first.
        checks: the driver's, in order.
        without: requirements of the first package that are left out, by the beginning of their names; then the rest is
            installed beside it.
    """

    name: str
    driver: str
    packages: tuple[str, ...]
    checks: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Short and unique."""
        return self.driver.partition(".")[0]


VLLM_ON_A_GPU = (
    *("torch", "nvidia", "nvtx", "pynvvideocodec", "flashinfer", "tilelang", "apache-tvm-ffi", "fastsafetensors"),
    *("instanttensor", "quack-kernels", "tokenspeed-mla", "humming-kernels"),
)
"""What vLLM's server needs on a GPU and its benchmark does not; gigabytes."""

CLIENTS = (
    Client(
        "openai (Python)",
        "openai_python.py",
        ("openai==3.57.0",),
        ("chat", "stream", "async", "logprobs", "parse", "responses", "responses.parse", "models", "an error"),
    ),
    Client(
        "openai (Node)",
        "openai_node.mjs",
        ("openai@7.57.0", ZOD),
        ("chat", "stream", "parse", "responses", "responses.parse", "models"),
    ),
    Client(
        "AI SDK, `@ai-sdk/openai-compatible`",
        "ai_sdk_compatible.mjs",
        ("@ai-sdk/openai-compatible@3.0.92", "ai@7.0.173", ZOD),
        ("generateText", "a system message", "streamText", "Output.object"),
    ),
    Client(
        "AI SDK, `@ai-sdk/openai`",
        "ai_sdk_openai.mjs",
        ("@ai-sdk/openai@4.0.118", "ai@7.0.173", ZOD),
        ("generateText", "a system message", "streamText", "Output.object"),
    ),
    Client(
        "LangChain `ChatOpenAI`",
        "langchain_chat.py",
        ("langchain-openai==1.7.4",),
        (
            *("invoke", "stream", "abatch", "an image block", "a history with two system messages"),
            *("with_structured_output", "the Responses API"),
        ),
    ),
    Client(
        "LlamaIndex `OpenAILike`",
        "llama_index_like.py",
        ("llama-index-llms-openai-like==0.8.1",),
        ("chat", "stream_chat", "achat", "complete", "structured answers"),
    ),
    Client(
        "LiteLLM",
        "litellm_completion.py",
        ("litellm==1.110.2",),
        (
            *("completion", "stream", "acompletion", "hosted_vllm", "response_format", "responses"),
            "a context overflow",
        ),
    ),
    Client("instructor", "instructor_json.py", ("instructor==1.17.0",), ("create", "async", "create_partial")),
    Client(
        "pydantic-ai",
        "pydantic_ai_agent.py",
        ("pydantic-ai-slim[openai]==2.68.0",),
        ("run", "run_stream", "a second turn", "NativeOutput", "the Responses API"),
    ),
    Client(
        "GuideLLM",
        "guidellm_run.py",
        ("guidellm==0.8.1", TORCH, "sentencepiece==0.2.3", "protobuf==7.36.2"),
        ("run with 2 streams",),
    ),
    Client(
        "`vllm bench serve`",
        "vllm_bench.py",
        ("vllm==0.33.0", TORCH),
        ("chat with pictures", "completions"),
        without=VLLM_ON_A_GPU,
    ),
)


class NotInstalledError(Exception):
    """The package manager has refused; the message is its own last line."""


def installed(client: Client, cache: Path) -> Path:
    """The folder of the client's environment; it is made once below `cache`, for one set of versions.

    Raises:
        NotInstalledError: its packages cannot be had.
    """
    digest = hashlib.sha256(repr((client.packages, client.without, sys.version)).encode()).hexdigest()[:12]
    folder = cache / f"{client.id}-{digest}"
    stamp = folder / "installed"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            _fill(client, folder)
        except NotInstalledError:
            shutil.rmtree(folder)
            raise
        stamp.touch()
    return folder


def _fill(client: Client, folder: Path) -> None:
    if client.driver.endswith(".mjs"):
        if shutil.which("npm") is None:
            raise NotInstalledError("there is no npm")
        _install("npm", "install", "--no-fund", "--no-audit", "--prefix", str(folder), *client.packages)
        return
    _install(sys.executable, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check")
    packages = client.packages
    if client.without:
        own, *others = packages
        _install(*pip, "--no-deps", own)
        packages = (*others, *_requirements(folder, own.partition("==")[0], client.without))
    _install(*pip, *packages)


def _install(*command: str) -> None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, timeout=INSTALL_S)
    if done.returncode:
        raise NotInstalledError((done.stderr.strip() or done.stdout.strip() or command[0]).splitlines()[-1])


def _requirements(folder: Path, package: str, without: tuple[str, ...]) -> list[str]:
    """What an installed package requires of others."""
    code = f"import importlib.metadata as m, json; print(json.dumps(m.requires({package!r})))"
    listed = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, check=True).stdout
    required: list[str] = json.loads(listed)
    return [each for each in required if "extra ==" not in each and not each.lower().startswith(without)]


def drive(client: Client, folder: Path, url: str) -> tuple[dict[str, str], str]:
    """Runs a client's driver against the server at `url`.

    Returns:
        What the driver says of each check: empty, or the problem; and its standard error.
    """
    script = DRIVERS / client.driver
    if script.suffix == ".mjs":  # Node looks for packages beside the file
        for path in DRIVERS.glob("*.mjs"):
            shutil.copy(path, folder)
        command = ["node", str(folder / client.driver)]
    else:
        command = [str(folder / "bin" / "python"), str(script)]
    server = {"LLAVA_URL": url, "LLAVA_PICTURE": str(DEMO_IMAGE), "LLAVA_TOKENIZER": str(BUILTIN)}
    with subprocess.Popen(
        command,
        env=_environment() | server,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            out, err = process.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"check":')]
    return {line["check"]: line["problem"] for line in lines}, err


def _environment() -> dict[str, str]:
    """Of a shell that knows neither this repository nor another server; no client reports to its makers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "OPENAI_"))}
    quiet = {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return kept | quiet | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
