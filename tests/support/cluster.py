"""A second ingress over the tiers of the session's application, with limits of its own; and the replicas' processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray import serve

from deployments.ingress import Ingress
from llava_serve.config import ApiOptions


@contextmanager
def limited_ingress(served: Any, name: str, **options: Any) -> Iterator[str]:
    """Runs it as the application `name` while the block runs; gives its URL. The options are those of `ApiOptions`.

    This process must be a job on the session's cluster.
    """
    tiers = [serve.get_deployment_handle(tier, "llava") for tier in ("ImagePreprocessor", "LlavaModel")]
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
    )
    serve.run(ingress.bind("builtin", ApiOptions(**options), *tiers), name=name, route_prefix=f"/{name}")
    try:
        yield f"{served.url}/{name}"
    finally:
        serve.delete(name)


def serve_logs(served: Any, pattern: str = "*.log") -> list[Path]:
    """The log files of Serve's processes."""
    return list((served.log.parent / "ray" / "session_latest" / "logs" / "serve").glob(pattern))


def replica_logs(served: Any, name: str) -> str:
    """What the replicas of a deployment have logged."""
    return "".join(each.read_text() for each in serve_logs(served, f"replica_llava_{name}_*.log"))


def replicas(name: str, served: Any) -> list[psutil.Process]:
    """The processes of a deployment, by the title that Ray gives them; other applications' on the machine left out."""
    title, ray_dir = f"ray::ServeReplica:llava:{name}", str(served.log.parent)
    named = [each for each in psutil.process_iter(["cmdline"]) if title in " ".join(each.info["cmdline"] or ())]
    return [each for each in named if (parent := each.parent()) and ray_dir in " ".join(parent.cmdline())]
