"""Serve's health checks of replicas, as its controller has logged them."""

from __future__ import annotations

from deployments.tools.local_cluster import LocalCluster

UNANSWERED = "Didn't receive health check response for replica"
"""How the controller says that a replica did not answer within `health_check_timeout_s`."""


def unanswered_checks(running: LocalCluster) -> int:
    """Those that no replica answered in time, since the application's start."""
    logs = running.log.parent / "ray" / "session_latest" / "logs" / "serve"
    return sum(each.read_text(encoding="utf-8").count(UNANSWERED) for each in logs.glob("controller_*.log"))
