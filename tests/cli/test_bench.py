"""`llava-serve bench`: real servers on real sockets, and figures that are known beforehand."""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_serve.bench.client import Client, Trace
from llava_serve.bench.load import Run
from llava_serve.bench.report import differences, percentiles, summarise, table
from llava_serve.bench.workload import Workload, make_conversations
from llava_serve.cli import main
from llava_serve.errors import CapacityError
from support.api_server import PacedBackend, app_over, serving
from support.builtin_server import builtin_over_http
from support.paths import ROOT

TEXT_ONLY = ["--images", "0", "--warmup", "0"]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; its status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["bench", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_a_closed_loop_reports_what_was_sent(bench: Callable[..., Any], tmp_path: Path) -> None:
    output, plot = tmp_path / "a.json", tmp_path / "a.svg"
    sizes = ["--image-size", "64x48,96x96", "--output-tokens", "3:9", "--ignore-eos", "--warmup", 1]
    with builtin_over_http() as web:
        status, printed, _ = bench(
            web.base_url, "--requests", 6, "--clients", 3, *sizes, "--output", output, "--plot", plot
        )
    report = json.loads(output.read_text())
    expected = sum(
        turn.max_tokens
        for conversation in make_conversations(Workload(6, image_sizes=((64, 48), (96, 96)), output_tokens=(3, 9)))
        for turn in conversation.turns
    )
    assert status == 0
    assert report["requests"] == {
        "ok": 6,
        "failed": 0,
        "not_sent": 0,
        "by_status": {"200": 6},
        "first_errors": {},
    }
    assert report["tokens"]["output"] == expected
    assert report["tokens"]["counted_by"] == "usage"
    assert report["tokens"]["image"] == 6 * 100  # the features of a picture, for the model that ships
    assert report["tokens"]["prompt"] > 6 * 100
    assert report["output_tokens_per_s"] == pytest.approx(expected / report["seconds"], rel=0.01)
    for latency in ("ttft_ms", "inter_token_ms", "end_to_end_ms"):
        values = list(report[latency].values())
        assert list(report[latency]) == ["p50", "p90", "p95", "p99"]
        assert values[0] >= 0
        assert values == sorted(values)
    assert report["ttft_ms"]["p50"] < report["end_to_end_ms"]["p50"] < report["seconds"] * 1e3
    assert sum(each["output_tokens"] for each in report["each"]) == expected
    assert report["settings"]["model"] == "builtin"
    assert ["output", "tokens", str(expected)] in [line.split() for line in printed.splitlines()]
    assert plot.read_text().count("<rect") == 4 * 4


def test_conversations_send_the_answers_on_and_begin_when_they_are_due(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "a.json"
    backend = PacedBackend(pace_s=0.02)
    with app_over(backend) as web:
        arguments = [web.base_url, "--rate", 30, "--requests", 5, "--turns", 2, *TEXT_ONLY, "--output", output]
        assert bench(*arguments, "--seed", 4)[0] == 0
    texts = sorted(
        [[getattr(part, "text", None) for part in message.parts] for message in messages]
        for messages, _ in backend.asked
    )
    assert [len(each) for each in texts] == [1, 3, 1, 3, 1]
    assert texts[1][1] == ["A red circle."]
    assert texts[1][0] == texts[0][0]
    rng, due, expected = random.Random(4), 0.0, []
    for turns in (2, 2, 1):
        expected.append(due)
        due += rng.expovariate(30 / turns)
    sent = [each["sent"] for each in json.loads(output.read_text())["each"]]
    assert len(sent) == 5
    assert all(any(abs(time - each) < 1e-3 for each in sent) for time in expected)


def test_an_open_loop_does_not_wait_for_answers(bench: Callable[..., Any]) -> None:
    most: list[int] = []

    class Counting(PacedBackend):
        async def prepare(self, *args: Any, **options: Any) -> Any:
            most.append(self.working)
            return await super().prepare(*args, **options)

    for pace, overlap in ((["--clients", 1], False), (["--rate", 200], True)):
        most.clear()
        with app_over(Counting(pace_s=0.05)) as web:
            assert bench(web.base_url, *pace, "--requests", 6, *TEXT_ONLY)[0] == 0
        assert (max(most) > 0) == overlap


@pytest.mark.parametrize(
    ("backend", "options", "statuses"),
    [
        (PacedBackend(fail_at=-1, failure=CapacityError("Busy.")), {}, {"429": 4}),
        (PacedBackend(cut_short=True), {}, {"error in stream": 4}),
    ],
)
def test_failures_are_counted_by_status(
    bench: Callable[..., Any], tmp_path: Path, backend: PacedBackend, options: dict[str, Any], statuses: dict[str, int]
) -> None:
    output = tmp_path / "a.json"
    with app_over(backend, **options) as web:
        status, printed, _ = bench(web.base_url, "--requests", 8, "--turns", 2, *TEXT_ONLY, "--output", output)
    report = json.loads(output.read_text())
    assert status == 1
    assert report["requests"]["by_status"] == statuses
    assert report["requests"]["not_sent"] == 4
    assert report["ttft_ms"] == {}
    ((name, sentence),) = report["requests"]["first_errors"].items()
    assert sentence
    assert f"The first {name}: {sentence}" in printed


def test_the_key_comes_from_a_file_or_the_environment(
    bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    arguments = ["--requests", 1, *TEXT_ONLY]
    with app_over(PacedBackend(), api_keys=["s3cret"]) as web:
        status, _, said = bench(web.base_url, *arguments)
        assert (status, said.count("\n")) == (2, 1)
        assert "requires an API key" in said
        assert bench(web.base_url, *arguments, "--api-key-file", key)[0] == 0
        monkeypatch.setenv("LLAVA_API_KEY", "s3cret")
        assert bench(web.base_url, *arguments)[0] == 0


def streaming(*events: str) -> ASGIApp:
    """An app that answers anything with these lines."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for event in events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    return app


WORD = 'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'
END = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\r\n\r\n'


@pytest.mark.parametrize(
    ("events", "status", "text"),
    [
        ((WORD, WORD, END), "200", "word word "),
        ((WORD[:20], WORD[20:] + ": a comment\n\n", "data: [DONE]\n\n"), "200", "word "),
        ((WORD, WORD), "cut off", "word word "),
        (("data: {\n\n",), "no event stream", ""),
        (('{"choices": []}',), "cut off", ""),
        ((WORD, 'data: {"error": {"message": "Too late."}}\n\n'), "error in stream", "word "),
    ],
)
def test_any_servers_stream_is_read(events: tuple[str, ...], status: str, text: str) -> None:
    async def ask(url: str) -> Trace:
        async with Client(url, "any") as client:
            return await client.ask([], 9)

    with serving(streaming(*events)) as url:
        trace = asyncio.run(ask(url))
    assert (trace.status, trace.text) == (status, text)
    assert trace.output_tokens == text.count("word")  # without usage, events are counted
    assert trace.error == ("Too late." if status == "error in stream" else "")


def test_figures_of_known_traces() -> None:
    usage = {"completion_tokens": 5, "prompt_tokens": 100, "prompt_tokens_details": {"image_tokens": 60}}
    run = Run(total=4, seconds=2.0)
    run.traces = [
        Trace(0.0, arrivals=[0.1, 0.2, 0.4], seconds=0.5, usage=usage),
        Trace(0.0, arrivals=[0.3], seconds=0.3, usage=usage | {"completion_tokens": 1}),
        Trace(0.0, status="429", error="Busy.", seconds=0.01),
    ]
    report = summarise(run)
    assert report["requests"]["by_status"] == {"200": 2, "429": 1}
    assert report["requests"]["not_sent"] == 1
    assert (report["requests_per_s"], report["output_tokens_per_s"]) == (1.0, 3.0)
    assert report["tokens"] == {"output": 6, "prompt": 200, "image": 120, "cached": None, "counted_by": "usage"}
    assert report["ttft_ms"]["p50"] == 200.0
    assert report["inter_token_ms"] == percentiles([0.1, 0.2])
    assert report["time_per_output_token_ms"]["p99"] == 100.0  # (0.5 - 0.1) / (5 - 1)
    assert report["end_to_end_ms"]["p50"] == 400.0
    assert percentiles([n / 1000 for n in range(1, 102)]) == {"p50": 51.0, "p90": 91.0, "p95": 96.0, "p99": 100.0}


def test_results_are_compared(bench: Callable[..., Any], tmp_path: Path) -> None:
    run = Run(total=1, seconds=2.0)
    run.traces = [Trace(0.0, arrivals=[0.1, 0.2], seconds=0.5)]
    first = {"settings": {"clients": 8, "seed": 0}, **summarise(run)}
    run.seconds = 4.0
    second = {"settings": {"clients": 4, "seed": 0}, **summarise(run)}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, report in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(report))
    status, printed, _ = bench("--compare", *paths, "--plot", tmp_path / "c.svg")
    assert status == 0
    rows = {line[:28].strip(): line[28:].split() for line in printed.splitlines()}
    assert rows["output tokens/s"][-4:] == ["1", "0.5", "0.50", "x"]
    assert rows["image tokens"][-2:] == ["-", "-"]
    assert printed.splitlines()[-1] == f"clients differs: 8 ({paths[0]}), 4 ({paths[1]})"
    assert (tmp_path / "c.svg").read_text().count("<rect") == 4 * 4 * 2
    assert differences({"a": first, "b": first}) == []
    assert len(table({"a": first, "b": second, "c": first}).splitlines()[1].split()) == 5


def test_a_workload_is_the_same_for_the_same_seed() -> None:
    workload = Workload(9, turns=2, image_sizes=((20, 10), (8, 8)), output_tokens=(1, 50))
    first = make_conversations(workload)
    assert first == make_conversations(workload)
    assert first != make_conversations(Workload(9, turns=2, image_sizes=((20, 10), (8, 8)), seed=1))
    assert [len(each.turns) for each in first] == [2, 2, 2, 2, 1]
    assert len({image for each in first for image in each.images}) == 5
    repeated = make_conversations(Workload(40, images=2, image_sizes=((8, 8),), repeated_images=0.5))
    assert 30 < len({image for each in repeated for image in each.images}) < 50
    same = make_conversations(Workload(9, image_sizes=((8, 8),), repeated_images=1.0))
    assert len({image for each in same for image in each.images}) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give the URL of a server"),
        (["http://127.0.0.1:1", "--compare", "a.json"], "Give the URL of a server"),
        (["http://127.0.0.1:1"], "No server answers at http://127.0.0.1:1"),
        (["localhost:8000"], "begins with http:// or https://; got localhost:8000"),
        (["--compare", "nowhere.json"], "nowhere.json is no result"),
        (["--compare", "pyproject.toml"], "pyproject.toml is no result"),
        (["http://127.0.0.1:1", "--output", "no/where.json"], "there is no such folder"),
        (["http://127.0.0.1:1", "--plot", "tests"], "tests cannot be written: it is a folder"),
        (["--compare", "pyproject.toml", "--output", "a.json"], "--compare measures nothing that --output"),
        (["http://127.0.0.1:1", "--api-key-file", "nowhere"], "The API key cannot be read"),
    ],
)
def test_a_usage_error_is_one_sentence(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(ROOT)
    status, printed, said = bench(*arguments)
    assert (status, printed, said.count("\n")) == (2, "", 1)
    assert sentence in said


@pytest.mark.parametrize(
    "flags", ["--rate 0", "--rate nan", "--timeout 0", "--clients 0", "--image-size 9", "--output-tokens 9:3"]
)
def test_a_flag_that_makes_no_sense_is_refused(flags: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", "http://127.0.0.1:1", *flags.split()])
    assert refused.value.code == 2


def test_a_terminal_sees_the_progress(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with app_over(PacedBackend(pace_s=0.2)) as web:
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        bench(web.base_url, "--requests", 3, "--clients", 1, *TEXT_ONLY)
    shown = terminal.getvalue().split("\r")
    assert shown[1].startswith("0 of 3 requests (0 failed)")
    assert any("1 in flight" in line for line in shown)
    assert shown[-1] == "\033[K"


def test_it_imports_no_torch_and_no_ray() -> None:
    script = "import sys, llava_serve.bench.load, llava_serve.bench.report; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT) == "set()\n"
