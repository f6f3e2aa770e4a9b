"""Draws the plots of docs/performance.md from the kept results. A test compares.

python -m benchmarks.docs_plots docs/images
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from llava_serve.bench.bar_chart import Panel, write_bars

RESULTS = Path(__file__).parent / "results"
OURS, THEIRS = "llava-serve", "transformers serve"


def draw(folder: Path) -> None:
    """Writes one SVG file for each plot."""
    write_bars(folder / "plot-throughput.svg", [_throughput()])
    write_bars(folder / "plot-overhead.svg", [_overhead()])
    write_bars(folder / "plot-steps.svg", [_steps()])
    write_bars(folder / "plot-routing.svg", [_routing()])


def _throughput() -> Panel:
    runs = _read("compare-60m")["runs"]
    cases = list(dict.fromkeys((run["clients"], run["same_picture"]) for run in runs))
    labels = [f"{clients} client{'s' * (clients > 1)}{', one picture' * same}" for clients, same in cases]
    series = {
        server: [
            round(
                median(
                    run["output_tokens_per_s"]
                    for run in runs
                    if (run["server"], run["clients"], run["same_picture"]) == (server, *case)
                )
            )
            for case in cases
        ]
        for server in (OURS, THEIRS)
    }
    return Panel("Output tokens/s", labels, series)


def _overhead() -> Panel:
    profiles = _read("overhead")["profiles"]
    quantiles = [("1", "p50"), ("1", "p95"), ("16", "p50"), ("16", "p95")]
    labels = [f"{clients} client{'s' * (clients != '1')}, {quantile}" for clients, quantile in quantiles]
    series = {
        f"{name} profile": [figures["added_ms"][clients]["total"][quantile] for clients, quantile in quantiles]
        for name, figures in profiles.items()
    }
    return Panel("Milliseconds that HTTP, ingress and hops add to the first token", labels, series)


def _steps() -> Panel:
    steps = _read("steps-60m")
    names = {"plain": "torch's operations", "native": "in C++"}
    labels = [f"{count} sequence{'s' * (count != '1')}" for count in steps]
    return Panel(
        "Milliseconds of a decode step",
        labels,
        {name: [step[key] for step in steps.values()] for key, name in names.items()},
    )


def _routing() -> Panel:
    cases = {
        "our router": "affinity, ingress replicas: 1",
        "our router, two ingresses": "affinity, ingress replicas: 2",
        "Serve's": "default, ingress replicas: 1",
        "Serve's, two ingresses": "default, ingress replicas: 2",
    }
    [results] = _read("routing")["by_round"]
    kinds = ["questions about pictures", "conversations"]
    series = {name: [round(100 * results[key][kind]["hit_share"]) for kind in kinds] for name, key in cases.items()}
    return Panel("Requests whose picture or beginning was cached, per cent", kinds, series)


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
