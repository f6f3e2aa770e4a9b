"""`llava-serve serve`: the Serve application on Ray, or the web app alone in this one."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

_IN_PROCESS_ONLY = (
    "model",
    "model_base",
    "vision_tower",
    "conv_mode",
    "quantization",
    "device",
    "dtype",
    "compile",
    "host",
    "port",
    "api_key",
)


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP",
        description="Starts the application of a Serve config on Ray, or with --in-process the web app alone.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="serve_config.yaml by default")
    parser.add_argument("--profile", type=Path, help="settings for Ray Serve's proxy and transport: production.env")
    parser.add_argument("--in-process", action="store_true", help="without Ray: one model, in this process")
    flags.add_model_flags(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="on a CPU, through torch.compile: starts later, runs faster",
    )
    parser.add_argument("--host", help="127.0.0.1 by default; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, help="8000 by default; 0 takes a free one")
    parser.add_argument("--api-key", action="append", metavar="KEY", help="demand this key; repeatable")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    if options.in_process:
        if options.config is not None or options.profile is not None:
            raise RequestError("--in-process takes no config and no profile: the flags say it all.")
        return _serve_in_process(options)
    for name in _IN_PROCESS_ONLY:
        if getattr(options, name) is not None:
            flag = "--load-" + options.quantization if name == "quantization" else "--" + name.replace("_", "-")
            raise RequestError(f"{flag} goes with --in-process; for Ray it stands in the config.")
    return _serve_on_ray(options.config or Path("serve_config.yaml"), options.profile)


def _serve_on_ray(config: Path, profile: Path | None) -> NoReturn:
    """Becomes the process that serves, so that signals and the exit status are its own; it checks the config first.

    Not Ray's `serve run`: on Ctrl-C that ends the proxy first, and with it the answers on their way.
    """
    if not config.is_file():
        raise RequestError(f"There is no config {config}; name one, or serve with --in-process.")
    command = [sys.executable, "-m", "deployments.tools.serve", "--config", str(config)]
    command += ["--profile", str(profile)] if profile is not None else []
    os.execv(sys.executable, command)


def _serve_in_process(options: argparse.Namespace) -> int:
    """Takes the port first: a model is not loaded in vain."""
    with _bound_socket(options.host or "127.0.0.1", 8000 if options.port is None else options.port) as door:
        model = flags.model_options(options)
        import uvicorn

        from llava_serve.api.app import create_app
        from llava_serve.api.in_process import InProcessBackend
        from llava_serve.async_llm import AsyncLLM
        from llava_serve.config import ApiOptions, EngineOptions, ImageOptions

        llm = AsyncLLM(model, EngineOptions(compile=bool(options.compile)), image_options=ImageOptions().isolated)
        backend = InProcessBackend(llm)
        app = create_app(backend, ApiOptions(api_keys=tuple(options.api_key or ())))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        host, port = door.getsockname()[:2]
        door.listen()  # before it is said: who connects from now on waits for the first turn of the loop
        print(f"Serving {backend.model_name} on http://{host}:{port}  (Ctrl-C drains and ends)", flush=True)
        # uvicorn drains on a signal and then raises it again, when there is nothing left to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        server.run(sockets=[door])
        llm.close()
    return 0


def _bound_socket(host: str, port: int) -> socket.socket:
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except (OSError, OverflowError) as error:
        door.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise RequestError(f"Port {port} is in use; choose another with --port.") from None
        raise RequestError(f"Cannot listen on {host}, port {port}.") from None
    return door
