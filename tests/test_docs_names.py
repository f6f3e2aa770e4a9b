"""Options, flags and fields that the documentation names are there, and do what it says."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_serve.api.protocol import ChatRequest, StreamOptions
from llava_serve.api.text_completion import CompletionRequest
from llava_serve.api.tokenization import DetokenizeRequest, TokenizeRequest
from llava_serve.api.validation import parse_request
from llava_serve.app_options import AppOptions
from llava_serve.cli import command_parser
from llava_serve.errors import UnsupportedParameterError
from llava_serve.metrics.definitions import METRICS, REFUSALS, STAGES
from support.code_blocks import CodeBlock, code_blocks
from support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"`(engine|images|api)\.(\w+)")


def cells(page: str) -> Iterator[list[str]]:
    """Those of each line of a page's tables."""
    for line in (ROOT / "docs" / page).read_text("utf-8").splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_are_those_of_the_config(page: Path) -> None:
    named = OPTION.findall(page.read_text("utf-8"))
    assert [name for name in named if name[1] not in type(getattr(AppOptions(), name[0])).model_fields] == []


def test_series_of_the_runbook_are_exported_and_its_labels_are_used() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    named = set(re.findall(r"\bllava_(?!serve)\w+", text))
    assert len(named) > 5
    assert named <= {metric.exported for metric in METRICS}
    reasons = {name for row in cells("operations.md") for name in labels(row, "reason")}
    assert len(reasons) > 5
    assert [name for name in reasons if not re.search(rf"\b{name}\b", REFUSALS.help)] == []
    stages = {name for row in cells("operations.md") for name in labels(row, "stage")}
    assert len(stages) > 5
    assert stages <= set(STAGES)


def labels(row: list[str], label: str) -> list[str]:
    """The values of a label in a row of the runbook: its first one has the label's name."""
    return re.findall(r'"(\w+)"', row[1]) if f"{label}=" in row[1] else []


def test_flags_are_those_of_the_commands() -> None:
    [choice] = [each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    known = {flag for command in choice.choices.values() for flag in command._option_string_actions}
    ours = [text for page in ("from-llava.md", "from-vllm.md") for _, here, *_ in cells(page) for text in quoted(here)]
    named = {flag for text in ours for flag in re.findall(r"--[\w-]+", text)}
    assert len(named) > 15
    assert named <= known


def test_fields_of_vllm_are_taken_or_refused_as_the_page_says() -> None:
    text = (ROOT / "docs" / "from-vllm.md").read_text("utf-8")
    [taken] = re.findall(r"^Taken in vLLM's meaning: (.+?)\n\n", text, re.DOTALL | re.MULTILINE)
    kinds = (ChatRequest, StreamOptions, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    fields = {name for kind in kinds for name in kind.model_fields}
    named = [name for name in quoted(taken) if "/" not in name and name != "stream_options"]
    assert len(named) > 15
    assert [name for name in named if not any(re.fullmatch(name.replace("*", ".+"), field) for field in fields)] == []
    refused = [
        name for theirs, ours, *_ in cells("from-vllm.md") if ours.startswith("refused") for name in quoted(theirs)
    ]
    assert len(refused) > 8
    for name in refused:
        body = {"messages": [{"role": "user", "content": "Hello"}], name: 2}
        with pytest.raises(UnsupportedParameterError, match=name):
            parse_request(json.dumps(body).encode(), ChatRequest)


def test_code_blocks_of_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n<!-- goes on -->\n```python\nprint(a)\n```\n\n"
        "<!-- not run: no cluster -->\n```sh\nray\n```\n```text\nnothing\n```\n```console\n$ seq 3\n1\n...\n```\n"
    )
    program, shell, console = code_blocks(page)
    assert program == CodeBlock("page.md", 1, "python", "a = 1\n\nprint(a)\n", None)
    assert (shell.reason, shell.script) == ("no cluster", "ray\n")
    assert console.script == "seq 3"
    assert console.is_shown("1\n2\n3\n")
    assert not console.is_shown("2\n3\n")
    assert program.is_shown("anything")
