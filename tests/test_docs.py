"""What the documents link to is there, and the reading order is as short as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.tools.config_reference import GROUPS, attribute_docs, page

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
"""A target in the repository, and the heading in it."""

MOST_LINES = 900


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


def test_the_reference_of_the_options_is_as_the_code() -> None:
    for _, _, options in GROUPS:
        assert attribute_docs(options).keys() == options.model_fields.keys()
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == page()
