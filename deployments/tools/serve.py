"""`make serve`: the application of a config on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from deployments.tools.local_cluster import ConfigError, LocalClusterError, local_cluster, read_config
from deployments.tools.serve_env import ServeEnvError, read_serve_env


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0 if the application ran and was stopped normally.

    It is 2 for a usage error, 130 if it was stopped before it ran or while it drained, and 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="python -m deployments.tools.serve", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument("--port", type=int, help="port, instead of the config's")
    parser.add_argument("--model", help="model, instead of the config's: a folder, or a hub id in the local cache")
    parser.add_argument("--profile", type=Path, help="settings of Serve's proxy and transport, such as production.env")
    options = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        config = read_config(options.config, port=options.port, model=options.model)
        profile = read_serve_env(options.profile) if options.profile else None
        print("Starting Ray and the replicas ...", flush=True)
        with local_cluster(config, profile=profile) as running:
            try:
                print(f"Serving on {running.url}  (Ctrl-C drains and ends; log: {running.log})", flush=True)
                if "RAY_AUTH_TOKEN" in os.environ:
                    print(f"Other Ray jobs with the same RAY_AUTH_TOKEN: RAY_ADDRESS={running.ray_address}", flush=True)
                running.wait()
            except KeyboardInterrupt:
                print("\nDraining: requests in flight are finished. Ctrl-C again ends at once.", flush=True)
    except (LocalClusterError, ServeEnvError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError | ServeEnvError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
