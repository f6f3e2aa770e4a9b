"""The spans that `examples.trace_file` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXPORTER = "examples.trace_file:processors"


class Spans:
    """All spans in a folder's files, in the order of their start."""

    def __init__(self, folder: Path) -> None:
        self.text = "".join(file.read_text("utf-8") for file in sorted(folder.glob("*.jsonl")))
        self.all: list[dict[str, Any]] = sorted(
            map(json.loads, self.text.splitlines()), key=lambda at: at["start_time"]
        )

    def of_trace(self, trace_id: str) -> list[dict[str, Any]]:
        """The spans of a trace; the id is that of `traceparent`."""
        return [span for span in self.all if span["context"]["trace_id"] == f"0x{trace_id}"]

    def below(self, parent: dict[str, Any]) -> list[dict[str, Any]]:
        """The children of a span."""
        return [span for span in self.all if span["parent_id"] == parent["context"]["span_id"]]

    def names_below(self, parent: dict[str, Any]) -> list[str]:
        return [span["name"] for span in self.below(parent)]

    def named(self, name: str, trace_id: str) -> dict[str, Any]:
        """The only span of that name in a trace."""
        [span] = [span for span in self.of_trace(trace_id) if span["name"] == name]
        return span
