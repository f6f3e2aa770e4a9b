"""The commands of the pages on measuring and evaluating run, with fewer requests and questions."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llava_serve.cli import main
from support.api_server import builtin_over_http
from support.paths import ROOT

SMALLER = ["--requests", "4", "--image-size", "64x48", "--output-tokens", "4"]
"""The last flag of a name counts."""


def commands(page: str) -> list[list[str]]:
    """Those of a page's shell blocks; a block that is not run gives its reason in its first line."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.+?)^```", text, re.DOTALL | re.MULTILINE)
    run = [block for block in blocks if not re.match(r"# not run: .{5}", block)]
    return [shlex.split(line) for block in run for line in block.splitlines()]


def test_bench_runs_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    closed, opened, compare = commands("bench.md")
    with builtin_over_http() as web:
        for _, *command in (closed, opened):
            assert command[:2] == ["bench", "http://127.0.0.1:8000"]
            assert main(["bench", str(web.base_url), *command[2:], *SMALLER]) == 0
    assert main(compare[1:]) == 0
    assert (tmp_path / "before.svg").exists()
    assert "differs: " in capsys.readouterr().out


def test_eval_prints_what_its_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    [[_, *command]] = commands("evaluation.md")
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    shown = text.split("```\n")[2].splitlines()
    assert len(shown) > 5
    assert [line for line in shown if line != "..." and line not in printed] == []
