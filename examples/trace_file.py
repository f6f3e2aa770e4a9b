"""An exporter of traces: each process writes its spans to a file of its own in a folder, a JSON object a line.

Without Ray: PYTHONPATH=. llava-serve serve --in-process --trace-exporter examples.trace_file:processors
On Ray it is the `exporter_import_path` of `tracing_config` (docs/tracing.md).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor


def processors() -> list[SpanProcessor]:
    """What Serve and `--trace-exporter` call. The folder is that of the environment variable TRACE_FOLDER."""
    folder = Path(os.environ.get("TRACE_FOLDER") or Path(tempfile.gettempdir()) / "llava-traces")
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8")
    line = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    return [SimpleSpanProcessor(line)]
