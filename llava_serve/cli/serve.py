"""`llava-serve serve`: the Serve application on Ray, or the web app alone in this process."""

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
        help="serve a model over HTTP",
        description="Start the application of a Serve config on Ray, or with --in-process the web app alone.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="the Serve config; serve_config.yaml by default")
    parser.add_argument(
        "--profile", type=Path, help="settings of Ray Serve's proxy and transport, such as production.env"
    )
    parser.add_argument("--in-process", action="store_true", help="serve one model in this process, without Ray")
    flags.add_model_flags(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="run the decoder through torch.compile on a CPU: slower start, faster answers",
    )
    parser.add_argument("--host", help="address to listen on; 127.0.0.1 by default, 0.0.0.0 for the network")
    parser.add_argument("--port", type=int, help="port to listen on; 8000 by default, 0 for a free one")
    parser.add_argument("--api-key", action="append", metavar="KEY", help="require this API key; repeatable")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serves until a signal ends it."""
    if options.in_process:
        if options.config is not None or options.profile is not None:
            raise RequestError("--in-process takes no config and no profile; use flags instead.")
        return _serve_in_process(options)
    for name in _IN_PROCESS_ONLY:
        if getattr(options, name) is not None:
            flag = "--load-" + options.quantization if name == "quantization" else "--" + name.replace("_", "-")
            raise RequestError(f"{flag} goes with --in-process; with Ray, set it in the config.")
    return _serve_on_ray(options.config or Path("serve_config.yaml"), options.profile)


def _serve_on_ray(config: Path, profile: Path | None) -> NoReturn:
    """Becomes the process that serves, so that signals and the exit status are its own; it checks the config first.

    Not Ray's `serve run`: on Ctrl-C that ends the proxy first, and with it the requests in flight.
    """
    if not config.is_file():
        raise RequestError(f"There is no config {config}; name one, or use --in-process.")
    command = [sys.executable, "-m", "deployments.tools.serve", "--config", str(config)]
    command += ["--profile", str(profile)] if profile is not None else []
    os.execv(sys.executable, command)


def _serve_in_process(options: argparse.Namespace) -> int:
    """Binds the port first, so that a port in use fails before a model is loaded."""
    with _bound_socket(options.host or "127.0.0.1", 8000 if options.port is None else options.port) as listener:
        model = flags.model_options(options)
        from llava_serve.api.app import create_app
        from llava_serve.api.http_server import server_of
        from llava_serve.api.in_process import InProcessBackend
        from llava_serve.async_llm import AsyncLLM
        from llava_serve.config import ApiOptions, EngineOptions

        llm = AsyncLLM(model, EngineOptions(compile=bool(options.compile)))
        backend = InProcessBackend(llm)
        app = create_app(backend, ApiOptions(api_keys=tuple(options.api_key or ())))
        server = server_of(app)
        host, port = listener.getsockname()[:2]
        print(f"Serving {backend.model_name} on http://{host}:{port}  (Ctrl-C drains and ends)", flush=True)
        # uvicorn drains on a signal and then raises it again, when there is nothing left to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        server.run(sockets=[listener])
        llm.close()
    return 0


def _bound_socket(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise RequestError(f"Port {port} is in use; choose another with --port.") from None
        raise RequestError(f"Cannot listen on {host}, port {port}.") from None
    return listener
