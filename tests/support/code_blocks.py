"""Code blocks of the documentation, and whether they are run.

A block of a language in `RUN` is run, unless a comment before it says `<!-- not run: REASON -->`. With the comment
`<!-- goes on -->` it is run together with the block before, as one program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from support.paths import ROOT

RUN = ("console", "sh", "python")
PAGES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(
    r"(?:<!-- (?:not run: (?P<reason>[^>]+?)|(?P<more>goes on)) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.M | re.S,
)


@dataclass(frozen=True)
class CodeBlock:
    """Attributes:
    page: its file's name.
    line: of the page, where it begins.
    reason: why it is not run, or None.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def script(self) -> str:
        """What a shell runs: of a `console` block, the lines behind `$`."""
        if self.language != "console":
            return self.code
        return "\n".join(line[2:] for line in self.code.splitlines() if line.startswith("$ "))

    @property
    def printed(self) -> str | None:
        """What a `console` block shows as printed, or None."""
        if self.language != "console":
            return None
        return "\n".join(line for line in self.code.splitlines() if not line.startswith("$ ")) or None

    def is_shown(self, output: str) -> bool:
        """Whether the output is what the block shows; a line of three dots stands for any lines."""
        if self.printed is None:
            return True
        shown = "\n".join(".*" if line == "..." else re.escape(line) for line in self.printed.splitlines())
        return re.fullmatch(shown, output.strip(), re.DOTALL) is not None


def code_blocks(page: Path) -> list[CodeBlock]:
    """Those of a page that are run or say why not."""
    text = page.read_text("utf-8")
    blocks: list[CodeBlock] = []
    for found in _BLOCK.finditer(text):
        language, code, reason = found["language"], found["code"], found["reason"]
        if found["more"]:
            blocks[-1] = replace(blocks[-1], code=f"{blocks[-1].code}\n{code}")
        elif language in RUN:
            blocks.append(CodeBlock(page.name, text.count("\n", 0, found.start()) + 1, language, code, reason))
    return blocks
