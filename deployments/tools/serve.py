"""`make serve`, and `llava-serve serve`: the application of a config on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from functools import partial
from pathlib import Path

from .config import CONFIG, ConfigError, check_address, check_strictly, packaged, parse_config
from .listening import listening
from .local_cluster import STANDARD_OUTPUT, LocalClusterError, free_port, local_cluster
from .serve_env import ServeEnvError, read_serve_env

_IN_CLONE = " with PYTHONPATH=." if __package__.startswith("deployments.") else ""
"""Ray's commands import the application's router."""
MODEL_VARIABLE, KEYS_FILE_VARIABLE = "LLAVA_MODEL", "LLAVA_API_KEYS_FILE"
"""Environment variables for two of the flags: containers are configured by them."""


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0 if the application ran and was stopped normally.

    It is 2 for a usage error, 130 if it was stopped before it ran or while it drained, and 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.serve", description=__doc__)
    parser.add_argument("--config", type=Path, help="the packaged one by default")
    parser.add_argument("--host", help="address, instead of the config's; beyond this machine it needs a key")
    parser.add_argument("--port", type=int, help="port, instead of the config's; 0 takes a free one")
    parser.add_argument(
        "--model",
        default=os.environ.get(MODEL_VARIABLE),
        help=f"model, instead of the config's: a folder, or a hub id in the local cache; or {MODEL_VARIABLE}",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        default=os.environ.get(KEYS_FILE_VARIABLE),
        help=f"accept the keys in it, one a line; or {KEYS_FILE_VARIABLE}",
    )
    parser.add_argument("--profile", type=Path, help="settings of Serve's proxy and transport: a file, or: production")
    parser.add_argument(
        "--dashboard",
        type=int,
        nargs="?",
        const=8265,
        metavar="PORT",
        help="start Ray's dashboard on this machine, for serve status and serve deploy, too; port 8265 by default",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="add the output of Ray and the replicas to a file, or with - to standard output",
    )
    parser.add_argument("--print-config", action="store_true", help="print the packaged config, and end")
    options = parser.parse_args(argv)
    if options.print_config:
        print(packaged(CONFIG), end="")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        config = parse_config(
            options.config,
            host=options.host,
            port=free_port() if options.port == 0 else options.port,
            model=options.model,
            api_keys_file=options.api_key_file,
        )
        profile = read_serve_env(options.profile) if options.profile else None
        check_address(config)
        check_strictly(config, options.config)  # takes seconds: it imports ray
        print(f"Starting Ray and the replicas of {options.config or 'the packaged config'} ...", flush=True)
        with local_cluster(
            config,
            profile=profile,
            tell=partial(print, flush=True),
            dashboard_port=options.dashboard,
            log=options.log,
        ) as running:
            try:
                print(*listening(running.process.pid, running.ports), sep="\n")
                print(f"Metrics: {running.metrics_url} of all tiers, {running.url}/metrics of the ingress", flush=True)
                print(f"The model is on {', '.join(running.devices)}.", flush=True)
                if running.warning:
                    print(f"WARNING: {running.warning}", file=sys.stderr, flush=True)
                log = "above and below" if running.log == STANDARD_OUTPUT else running.log
                print(f"Serving on {running.url}  (Ctrl-C drains and ends; log: {log})", flush=True)
                if options.dashboard is not None:
                    address = f"http://127.0.0.1:{options.dashboard}"
                    print(f"Ray's dashboard: {address}; `serve status -a {address}` works{_IN_CLONE}", flush=True)
                    if "RAY_AUTH_TOKEN" not in os.environ:
                        print("It asks for a token: set RAY_AUTH_MODE and RAY_AUTH_TOKEN before the start.", flush=True)
                if "RAY_AUTH_TOKEN" in os.environ:
                    print(f"Other Ray jobs with the same RAY_AUTH_TOKEN: RAY_ADDRESS={running.ray_address}", flush=True)
                    print(
                        "(0.0.0.0 reaches 127.0.0.1, which Ray replaces by another address of the machine.)", flush=True
                    )
                running.wait()
            except KeyboardInterrupt:
                print("\nDraining: requests in flight are finished. Ctrl-C again ends at once.", flush=True)
    except (ConfigError, LocalClusterError, ServeEnvError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, LocalClusterError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
