"""The series that the dashboard asks for."""

from __future__ import annotations

import json
import re

from support.paths import ROOT

DASHBOARD = ROOT / "k8s" / "components" / "monitoring" / "llava-serve.json"


def dashboard_series() -> set[str]:
    """All names of series in the queries."""
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert all("ray_llava_" in query or "ray_serve_" in query for query in queries)
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}
