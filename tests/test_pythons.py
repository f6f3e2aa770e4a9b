"""The newer Pythons, in an environment that pip makes quickly: without torch, and with the tests that do without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.paths import ROOT

NEED_TORCH = ("accelerate", "torch", "transformers")
FOR_TESTS = (
    "httpx",
    "jsonschema",
    "kubernetes-validate",
    "openai",
    "psutil",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "trustme",
)
TESTS = (
    "tests/api/test_api_endpoints.py",
    "tests/api/test_api_flow.py",
    "tests/api/test_api_limits.py",
    "tests/api/test_api_requests.py",
    "tests/api/test_openai_messages.py",
    "tests/engine/test_sampling_params.py",
    "tests/images",
    "tests/prompts",
    "tests/serve/test_config.py",
    "tests/serve/test_k8s.py",
    "tests/serve/test_router.py",
    "tests/test_errors.py",
)
QUIETLY = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-m",
    "not slow and not extended",
    # These need torch.
    "--ignore=tests/images/test_answers.py",
    "--ignore=tests/images/test_decode_ends.py",
    "--ignore=tests/images/test_link_users.py",
    "--ignore=tests/prompts/test_chat_templates.py",
    "--ignore=tests/prompts/test_layouts.py",
    "--ignore=tests/prompts/test_template_filters.py",
    "--ignore=tests/prompts/test_tokenizer.py",
    "--deselect=tests/prompts/test_template_sandbox.py::test_a_checkpoint_with_such_a_template_is_not_opened",
)
COLLECT = """
import sys
import pytest
needed, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(needed.split(",")))  # importing them fails
sys.exit(pytest.main(["--collect-only", *arguments]))
"""
COMPILE = """
import pathlib, sys
paths = [path for folder in sys.argv[1:] for path in pathlib.Path(folder).rglob("*.py")]
for path in paths:
    compile(path.read_bytes(), path, "exec")
print(len(paths))
"""


@pytest.fixture(params=["3.12", "3.13"])
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter: on the path, or one of pyenv's."""
    name = f"python{request.param}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (shutil.which(name), *sorted(pyenv.glob(f"versions/{request.param}.*/bin/{name}"))):
        # One of pyenv's own programs may be on the path that stands for no interpreter.
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    pytest.skip(f"{name} is not installed")


@pytest.mark.extended
def test_those_tests_import_no_torch() -> None:
    command = [sys.executable, "-c", COLLECT, ",".join(NEED_TORCH), *QUIETLY, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_file_compiles_without_a_warning(python: str) -> None:
    folders = ["llava_serve", "deployments", "tests", "benchmarks", "testbed", "examples", "training"]
    done = subprocess.run(
        [python, "-W", "error", "-c", COMPILE, *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_needs_no_torch_passes(python: str, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["serve"], *FOR_TESTS]
    packages = [each for each in needed if not each.startswith(NEED_TORCH)]
    subprocess.run([python, "-m", "venv", tmp_path], check=True)
    installed = str(tmp_path / "bin" / "python")
    pip = [installed, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", *packages]
    done = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pytests = [installed, "-m", "pytest", *QUIETLY, *TESTS]
    done = subprocess.run(pytests, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.splitlines()[-1].split()[0]) > 1500, done.stdout
