"""Writes the reference of the metrics from their table.

python -m deployments.tools.metrics_reference > docs/metrics.md
"""

from __future__ import annotations

import sys

from llava_serve.metrics.definitions import METRICS, Metric

INTRODUCTION = """# Metrics

<!-- Written by `python -m deployments.tools.metrics_reference > docs/metrics.md`; a test compares. -->

- `GET /metrics` of `llava-serve serve --in-process` has all series of the process, in Prometheus' format.
- `GET /metrics` of the application on Ray has those of the ingress replica that answers.
- Ray's agents have those of all tiers and replicas; `llava-serve serve` prints the address, and on Kubernetes the
  PodMonitor names the ports. Names begin with `ray_`, and Serve adds the labels `application`, `deployment` and
  `replica`.

`/metrics` needs a key where keys are set: `authorization: {credentials: KEY}` in Prometheus' `scrape_configs`.
vLLM's names are `vllm:NAME` on our page and `ray_vllm_NAME` through Ray, where Ray's dashboard "Serve LLM" reads them;
their label `model_name` is `api.model_name`. A Grafana dashboard of the series through Ray is
[`llava-serve.json`](../k8s/components/monitoring/llava-serve.json); on Kubernetes the component `monitoring` brings it.

With `return_timings` a request gets its own split, in milliseconds: in the header `Server-Timing`, and as `timings` in
the answer or in the last event of a stream. The stages together are the time to the first token. A preempted request
and a beam search have their wait in `prefill`. On a GPU `vision` is the time until the tower's work is launched; the
rest of it counts for `prefill`.

Each request is a line of the logger `llava_serve.access`, also in the ingress replica's log: id, method, path, status,
outcome, seconds, model, tokens, time to the first token, and why it failed. With Serve's
`logging_config: {encoding: JSON}`, and in-process with `--log-format json`, these are fields. No line has a
question, an answer, a picture or a key.
"""

TIERS = {
    "ingress": "Requests",
    "picture": "Pictures",
    "model": "The engine",
}
"""With a heading."""


def main() -> int:
    """Prints the page."""
    sys.stdout.write(page())
    return 0


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([INTRODUCTION, *(_section(tier) for tier in TIERS)])


def _section(tier: str) -> str:
    lines = [_line(metric) for metric in METRICS if metric.tier == tier]
    heading = [f"## {TIERS[tier]}", "", f"From the {tier} tier." if tier != "ingress" else "From the ingress.", ""]
    return "\n".join([*heading, "| series | kind | labels | in vLLM | |", "|---|---|---|---|---|", *lines, ""])


def _line(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    vllm = "" if metric.exported_vllm is None else f"`{metric.exported_vllm}`"
    return f"| `{metric.exported}` | {metric.kind} | {labels} | {vllm} | {metric.help} |"


if __name__ == "__main__":
    raise SystemExit(main())
