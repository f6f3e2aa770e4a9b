"""What is reported: one JSON object for a run, a table of it, and a table of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_serve.bench.bar_chart import Panel, write_bars
from llava_serve.bench.load import Run

PERCENTILES = (50, 90, 95, 99)
LATENCIES = {
    "ttft_ms": "time to first token",
    "inter_token_ms": "inter-token latency",
    "time_per_output_token_ms": "time per output token",
    "end_to_end_ms": "end to end",
}
RATES = {"output_tokens_per_s": "output tokens/s", "requests_per_s": "requests/s"}
TOKENS = {"prompt": "prompt tokens", "image": "image tokens", "cached": "cached tokens", "output": "output tokens"}

Report = dict[str, Any]


def summarise(run: Run) -> Report:
    """The figures of a run. Failed requests are counted, and are in no other figure.

    A latency is a dictionary of percentiles in milliseconds, empty if nothing was measured. `inter_token_ms` is the
    time between events with text, of which a server may send one for several tokens; `time_per_output_token_ms` is
    that from the first of them to the end of the answer, divided by the tokens after the first.
    """
    good = [trace for trace in run.traces if trace.ok]
    tokens = sum(trace.output_tokens for trace in good)
    failures = {trace.status: trace.error for trace in reversed(run.traces) if not trace.ok}
    answered = [trace for trace in good if trace.arrivals]
    return {
        "seconds": round(run.seconds, 3),
        "requests": {
            "ok": len(good),
            "failed": len(run.traces) - len(good),
            "not_sent": run.total - len(run.traces),
            "by_status": dict(Counter(trace.status for trace in run.traces).most_common()),
            "first_errors": failures,
        },
        "requests_per_s": round(len(good) / run.seconds, 3),
        "output_tokens_per_s": round(tokens / run.seconds, 2),
        "tokens": {
            "output": tokens,
            "prompt": _reported(good, "prompt_tokens"),
            "image": _reported(good, "prompt_tokens_details", "image_tokens"),
            "cached": _reported(good, "prompt_tokens_details", "cached_tokens"),
            "counted_by": "usage" if all("completion_tokens" in trace.usage for trace in good) else "events",
        },
        "ttft_ms": percentiles([trace.arrivals[0] for trace in answered]),
        "inter_token_ms": percentiles([gap for trace in answered for gap in np.diff(trace.arrivals)]),
        "time_per_output_token_ms": percentiles(
            [
                (trace.seconds - trace.arrivals[0]) / (trace.output_tokens - 1)
                for trace in answered
                if trace.output_tokens > 1
            ]
        ),
        "end_to_end_ms": percentiles([trace.seconds for trace in good]),
    }


def each_request(run: Run) -> list[dict[str, Any]]:
    """The requests in the order of their sending: times in seconds, `sent` since the run began."""
    return [
        {
            "sent": round(trace.sent - run.begun, 4),
            "status": trace.status,
            "ttft": round(trace.arrivals[0], 4) if trace.arrivals else None,
            "seconds": round(trace.seconds, 4),
            "output_tokens": trace.output_tokens,
            "prompt_tokens": trace.usage.get("prompt_tokens"),
        }
        for trace in sorted(run.traces, key=lambda trace: trace.sent)
    ]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`PERCENTILES` in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"p{q}": round(float(value), 2) for q, value in zip(PERCENTILES, values, strict=True)}


def table(reports: Mapping[str, Report]) -> str:
    """Figures of runs side by side, by the runs' names; with two, what the second is to the first."""
    lines = [["", *reports]]
    for name, values in _figures(list(reports.values())):
        lines.append([name, *("-" if value is None else f"{value:,g}" for value in values)])
        if len(values) == 2:
            first, second = values
            lines[-1].append(f"{second / first:.2f} x" if first and second is not None else "")
    widths = [max(len(cells[at]) if at < len(cells) else 0 for cells in lines) for at in range(max(map(len, lines)))]
    texts = (
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=False))
        )
        for cells in lines
    )
    return "\n".join(text.rstrip() for text in texts)


def differences(reports: Mapping[str, Report]) -> list[str]:
    """What was not the same in the runs, beside their figures: a sentence each."""
    names = dict.fromkeys(name for report in reports.values() for name in report["settings"])
    found = []
    for name in names:
        values = {label: report["settings"].get(name) for label, report in reports.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            listed = ", ".join(f"{value} ({label})" for label, value in values.items())
            found.append(f"{name} differs: {listed}")
    return found


def plot(path: Path, reports: Mapping[str, Report]) -> None:
    """Writes the latencies' percentiles as bars (SVG), one colour per run. One that a run has not is left out."""
    panels = [
        Panel(f"{title}, ms", list(first), {name: list(report[key].values()) for name, report in reports.items()})
        for key, title in LATENCIES.items()
        if (first := next(iter(reports.values()))[key]) and all(report[key] for report in reports.values())
    ]
    write_bars(path, panels)


def _reported(traces: Sequence[Any], *keys: str) -> int | None:
    """The sum of a field of `usage`; None where a server does not report it."""
    total = 0
    for trace in traces:
        value: Any = trace.usage
        for key in keys:
            value = (value or {}).get(key)
        if value is None:
            return None
        total += int(value)
    return total


def _figures(reports: Sequence[Report]) -> Iterator[tuple[str, list[float | None]]]:
    yield "requests ok", [report["requests"]["ok"] for report in reports]
    statuses = dict.fromkeys(status for report in reports for status in report["requests"]["by_status"])
    for status in statuses:
        if status != "200":
            yield f"failed: {status}", [report["requests"]["by_status"].get(status, 0) for report in reports]
    if any(report["requests"]["not_sent"] for report in reports):
        yield "not sent, after a failed turn", [report["requests"]["not_sent"] for report in reports]
    yield "seconds", [report["seconds"] for report in reports]
    for key, title in RATES.items():
        yield title, [report[key] for report in reports]
    for key, title in TOKENS.items():
        yield title, [report["tokens"][key] for report in reports]
    for key, title in LATENCIES.items():
        for percentile in (f"p{q}" for q in PERCENTILES):
            yield f"{title}, ms, {percentile}", [report[key].get(percentile) for report in reports]
