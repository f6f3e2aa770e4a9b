"""The command line as a person runs it: a process, its output, its exit status."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

import pytest

from llava_serve import __version__
from llava_serve.cli import main
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams
from support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
MODEL = CHECKPOINTS / "llava-v1.5-tiny"
CASE = json.loads((GOLDEN / "cases.json").read_text())["llava-v1.5-tiny"]["cases"][0]
PICTURE = GOLDEN / "images" / "landscape.png"
ANSWER = SamplingParams(temperature=0, max_new_tokens=20)
GREEDY = ["--temperature", "0", "--max-new-tokens", "20", "--dtype", "float32", "--device", "cpu"]


@dataclass(frozen=True)
class Done:
    """The outcome of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a command in this process, which has torch already."""

    def run(*arguments: object, said: str | TextIO = "") -> Done:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "stdin", io.StringIO(said) if isinstance(said, str) else said)
        status = main([str(argument) for argument in arguments])
        return Done(status, *capfd.readouterr())

    return run


def run_inside(script: str) -> str:
    """The output of a script, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_command_line_is_light() -> None:
    heavy = ("ray", "torch", "transformers", "fastapi", "uvicorn", "requests", "PIL")
    loaded = run_inside(f"import sys, llava_serve.cli; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]\n"


def test_the_client_is_the_applications_own_and_found_when_it_is_asked_for() -> None:
    script = "import sys, llava_serve.client as c; print('ray' in sys.modules); print(c.LlavaClient.__module__)"
    loaded, module = run_inside(script).split()
    assert loaded == "False"
    assert module in ("deployments.client", "llava_serve_deployments.client")


def test_ask_answers_as_the_original_does(cli: Callable[..., Done]) -> None:
    done = cli("ask", "--model", MODEL, "--image", PICTURE, CASE["query"], *GREEDY)
    assert (done.returncode, done.stdout) == (0, CASE["greedy_text"] + "\n")


def test_a_terminal_sees_that_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["ask", "--model", str(MODEL), str(PICTURE), CASE["query"], *GREEDY]) == 0
    assert terminal.getvalue() == f"Loading {MODEL} ...\r\033[K"


def test_ask_takes_the_originals_flags_and_prints_json(cli: Callable[..., Done]) -> None:
    done = cli(
        *(
            "ask",
            "--model-path",
            MODEL,
            "--image-file",
            f"{PICTURE};{PICTURE}",
            "--sep",
            ";",
            "--conv-mode",
            "llava_v1",
        ),
        *("--query", "One <image-placeholder> and two <image-placeholder>", "--max_new_tokens", 5, "--top_p", 0.9),
        *("--temperature", 0.5, "--seed", 3, "--num_beams", 1, "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["model"] == "llava-v1.5-tiny"
    assert result["prompt"].count("<image>") == 2
    assert len(result["token_ids"]) == 5
    assert result["finish_reason"] == "length"
    assert result["num_prompt_tokens"] > 32


def test_chat_keeps_the_history(cli: Callable[..., Done]) -> None:
    done = cli("chat", "--model", MODEL, "--image", PICTURE, *GREEDY, said=f"{CASE['query']}\nAnd then?\n\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("> ")[1:3]
    assert first == CASE["greedy_text"] + "\n"
    assert second.strip()
    alone = cli("chat", "--model", MODEL, "--image", PICTURE, *GREEDY, said="And then?\n")
    assert alone.stdout.split("> ")[1] != second


def test_pictures_stand_before_the_question(cli: Callable[..., Done]) -> None:
    expected = CASE["greedy_text"] + "\n"
    assert cli("ask", "--model", MODEL, *GREEDY, PICTURE, CASE["query"]).stdout == expected
    with PICTURE.open() as file:
        assert cli("ask", "--model", MODEL, *GREEDY, "-", CASE["query"], said=file).stdout == expected


def test_chat_takes_commands(cli: Callable[..., Done], tmp_path: Path) -> None:
    said = ["/image nowhere.png", "/what", "What is this?", "/reset", f"/image {PICTURE}", CASE["query"]]
    said += [f"/save {tmp_path / 'chat.json'}", f"/save {tmp_path}"]
    done = cli("chat", "--model", MODEL, *GREEDY, said="\n".join([*said, ""]))
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].startswith("The picture nowhere.png cannot be read")
    assert done.stderr.splitlines()[1] == f"{tmp_path} cannot be written: Is a directory."
    assert "/save FILE" in done.stdout.split("> ")[2]
    assert done.stdout.split("> ")[6] == CASE["greedy_text"] + "\n"
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert LLM(str(MODEL), dtype="float32", device="cpu").chat(saved[:1], sampling=ANSWER).text == saved[1]["content"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ask", "--model", MODEL], "Give a question"),
        (["ask", "--model", MODEL, PICTURE], "Give a question"),
        (["ask", "--model", MODEL, PICTURE, ""], "Give a question"),
        (["ask", "--model", MODEL, "--query", "a", "b"], "There is no picture 'b'"),
        (["ask", "--model", MODEL, "What", "is", "this?"], "is put in quotes"),
        (["ask", "--model", MODEL, "--image", PICTURE, PICTURE, "What?"], "their order matters"),
        (["ask", "--model", __file__, "What?"], "is a file"),
        (["ask", "--model", MODEL, "--image", "nowhere.png", "What?"], "nowhere.png cannot be read"),
        (["ask", "--model", MODEL, "--image", __file__, "What?"], f"{__file__}: The data is plain text"),
        (["ask", "--model", "nowhere", "What?"], "nowhere"),
        (["ask", "--model", MODEL, "--image-file", "a.png", "--sep", "", "What?"], "--sep must not be empty"),
        (["ask", "--model", MODEL, "--image-file", "a.png,", "What?"], "The name of a picture is empty"),
        (["ask", "--model", MODEL, "--temperature", "-1", "What?"], "temperature must be between"),
        (["ask", "--model", MODEL, "--device", "cuda:99", "What?"], "There is no device cuda:99"),
        (["ask", "--model", MODEL, "--num-beams", "2", "--temperature", "1", "What?"], "num_beams"),
        (["chat", "--image", "-"], "reads questions from standard input"),
        (["chat", "--model", MODEL, "--image", "nowhere.png"], "nowhere.png cannot be read"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", CHECKPOINTS / "llava-v1.5-tiny-lora"], "model_base"),
        (["serve", "nowhere.yaml"], "There is no config nowhere.yaml"),
        (["serve", "--device", "cpu"], "--device goes with --in-process"),
        (["serve", "--api-key", "secret"], "--api-key goes with --in-process"),
        (["serve", "builtin", "--model", "builtin"], "Name the model once"),
        (["serve", "--load-4bit"], "--load-4bit goes with --in-process"),
        (["serve", "--no-compile"], "--compile goes with --in-process"),
        (["serve", "--in-process", "a.yaml"], "a.yaml cannot be read"),
        (["serve", "--in-process", "--print-config"], "prints no config"),
        (["serve", "--in-process", "nowhere", "--port", "0"], "nowhere"),
        (["serve", "--in-process", "--port", "80000"], "There is no port 80000"),
        (["serve", "--in-process", "--port", "0", "--api-key-file", "nowhere"], "API keys nowhere cannot be read"),
        (["serve", "--in-process", "--port", "0", "--host", "0.0.0.0"], "On 0.0.0.0 anyone who reaches this machine"),
        (["serve", "--in-process", "--host", "not.a.host.invalid"], "Cannot listen on not.a.host.invalid"),
    ],
    ids=lambda value: " ".join(str(part) for part in value[:3]) if isinstance(value, list) else value,
)
def test_a_usage_error_is_one_sentence(cli: Callable[..., Done], arguments: list[object], sentence: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("llava-serve: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_versions_are_those_installed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    torch, ray = metadata.version("torch"), metadata.version("ray")
    assert capfd.readouterr().out == f"llava-serve {__version__}\ntorch {torch}\nray {ray}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["ask", "--device", "tpu", "What?"], "'tpu' is not auto"),
        (["ask", "--dtype", "int8"], "int8"),
        (["sing"], "sing"),
        (["ask", "--temprature", "0", "What?"], "ask: --temprature is unknown; did you mean --temperature? 'llava-"),
        (["inspect", "builtin", "more"], "llava-serve inspect: more is unknown. 'llava-serve inspect --help' tells"),
        (["bench", "http://127.0.0.1:1", "--images", "x"], "--images: must be a whole number, 0 or more; got 'x'."),
    ],
)
def test_a_wrong_flag_is_reported_by_the_parser(
    capfd: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capfd.readouterr().err
    assert word in said
    assert said.count("\n") == 1


@pytest.mark.extended
def test_a_closed_pipe_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "llava_serve.cli", "ask", "--model", MODEL, "What?", "--max-new-tokens", "300"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("checkpoint", "base", "lines"),
    [
        (
            "llava-v1.5-tiny",
            None,
            [
                "llama: 3 layers of 64, 4 heads",
                "16 per picture",
                "mlp2x_gelu (48 to 64)",
                "llava_v1: ",
                "clip-vit-tiny",
            ],
        ),
        ("llava-v1.5-tiny-lora", "vicuna-v1.5-tiny", ["LoRA weights; the rest is in ", "2048 tokens"]),
        (
            "llava-v1.6-mistral-tiny",
            None,
            ["mistral: 3 layers of 64, 4 heads (2 for keys and values)", "70 for 640 x 480", "in the checkpoint"],
        ),
        ("llava-mpt-tiny", None, ["mpt: 3 layers of 64, 4 heads", "tokenizers", "linear (48 to 64)"]),
    ],
)
def test_inspect_describes_a_checkpoint(
    cli: Callable[..., Done], checkpoint: str, base: str | None, lines: list[str]
) -> None:
    more = ["--model-base", CHECKPOINTS / base] if base else []
    done = cli("inspect", CHECKPOINTS / checkpoint, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") <= 24
    for line in (
        *lines,
        "upright as EXIF says",
        "JPEGs over 64,000,000 pixels",
        "over white; images.transparency: drop",
    ):
        assert line in done.stdout


def test_each_command_has_an_example_and_its_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("ask", "chat", "serve", "inspect"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capfd.readouterr().out
        assert f"llava-serve {command} " in printed.split("examples:")[1]
        assert "default" in printed


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completions_are_printed(capfd: pytest.CaptureFixture[str], shell: str) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    script = capfd.readouterr().out
    assert "--vision-tower-weights" in script
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=script, text=True, check=False).returncode == 0
