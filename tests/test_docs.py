"""What the documents link to is there, and the reading order is as short as it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from deployments.tools import command_reference, config_reference, metrics_reference, request_reference
from llava_serve.app_options import AppOptions

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
"""A target in the repository, and the heading in it."""

MOST_LINES = 900
PACKAGES = [path for name in ("llava_serve", "deployments") for path in (ROOT / name).rglob("*.py")]


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for path, heading in LINK.findall(document.read_text("utf-8")):
        target = document.parent / path if path else document
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(f"{path}#{heading}")
    assert not broken


def test_there_are_documents_and_links() -> None:
    named = {path.name for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "architecture.md"} <= named
    assert len(LINK.findall(ARCHITECTURE.read_text("utf-8"))) > 50


def test_the_blocks_about_ray_stand_in_the_examples_that_are_run() -> None:
    blocks = re.findall(
        r"^```python\n# of (\S+)\n(.+?)^```", (ROOT / "docs" / "ray.md").read_text("utf-8"), re.S | re.M
    )
    assert blocks
    for example, block in blocks:
        assert block in (ROOT / example).read_text("utf-8")


def test_the_reading_order_is_as_long_as_it_says() -> None:
    text = ARCHITECTURE.read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| \[(.+?)\]\(\.\./\1\) \| (\d+) \|", text, re.MULTILINE)
    stated = {path: int(lines) for path, lines in rows}
    [command] = re.findall(r"^wc -l .+$", text, re.MULTILINE)
    counted = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    real = {path: int(lines) for lines, path in re.findall(r"(\d+) (\S+)", counted)}
    total = real.pop("total")
    assert stated.keys() == real.keys()
    assert {path: lines for path, lines in real.items() if abs(stated[path] - lines) > lines / 10} == {}
    assert f"In this order; it is {sum(stated.values())} lines." in text
    assert max(total, sum(stated.values())) < MOST_LINES


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((tmp_path / one).is_file() for one in pages)


def test_the_short_list_names_every_page() -> None:
    listed = re.findall(r"\]\((\S+\.md)\)", (ROOT / "docs" / "llms.txt").read_text("utf-8"))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("commands.md", command_reference),
        ("configuration.md", config_reference),
        ("fields.md", request_reference),
        ("metrics.md", metrics_reference),
    ],
)
def test_a_written_page_is_as_the_code(name: str, reference: Any) -> None:
    assert (ROOT / "docs" / name).read_text("utf-8") == reference.page()


def test_every_option_has_its_meaning() -> None:
    for _, _, options in config_reference.GROUPS:
        assert config_reference.attribute_docs(options).keys() == options.model_fields.keys()


UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20}
LIMIT = re.compile(r"^\| [^|]+ \| ([\d,.]+) ?(s|KiB|MiB)? \| [^|]+ \| `([\w.]+)` \|$", re.MULTILINE)


def test_the_limits_are_those_of_the_code() -> None:
    text, _, _ = (ROOT / "docs" / "limits.md").read_text("utf-8").partition("## Not supported")
    limits = LIMIT.findall(text)
    assert len(limits) == len(re.findall(r"^\| (?!limit )\w", text, re.MULTILINE)) > 30
    stated = {name: float(value.replace(",", "")) * UNITS[unit] for value, unit, name in limits}
    assert stated == {name: limit_of(name) for name in stated}


def limit_of(name: str) -> float:
    """The value of a constant, or the default of an option."""
    place, _, last = name.rpartition(".")
    owner = getattr(AppOptions(), place) if "." not in place else import_module(place)
    return float(getattr(owner, last))


def test_the_sentences_of_troubleshooting_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    sentences = [
        sentence for table in text.split("| sentence |")[1:] for sentence in re.findall(r"^\| `(.+?)` \|", table, re.M)
    ]
    assert len(sentences) > 30
    said = "\n".join(literal for path in PACKAGES for literal in literals(path))
    parts = {part.strip() for sentence in sentences for part in sentence.split("...")} - {""}
    assert [part for part in parts if part not in said] == []


def literals(path: Path) -> list[str]:
    """All texts in the code of a file; those between the fields of an f-string, too."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_plots_are_those_of_the_results(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.docs_plots", tmp_path], cwd=ROOT, check=True)
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "images").glob("plot-*.svg")}
