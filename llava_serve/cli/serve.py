"""`llava-serve serve`: the Serve application on Ray, or the web app alone in this one."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from llava_serve.cli import options as flags
from llava_serve.cli.ports import bound_socket
from llava_serve.errors import RequestError
from llava_serve.ray_application import application_package

_PASSED_ON = ("model", "host", "port", "api_key_file", "profile")
"""To the process that serves on Ray."""

_IN_PROCESS_ONLY = (
    "model_base",
    "vision_tower",
    "conv_mode",
    "quantization",
    "device",
    "dtype",
    "compile",
    "api_key",
)
"""On Ray they stand in the config. A key would get into Ray's log there, too; its file's path does no harm."""


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP",
        description="Starts the application of a Serve config on Ray, or with --in-process the web app alone.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="MODEL_OR_CONFIG",
        help="a model, or a Serve config (*.yaml) instead of the packaged one",
    )
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
    parser.add_argument("--api-key-file", metavar="FILE", help="demand one of the keys in a file, one a line")
    parser.add_argument("--profile", type=Path, help="of Ray Serve's proxy and transport: production, or a file")
    parser.add_argument("--print-config", action="store_true", help="print the packaged config, to begin one's own")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    config = options.what if options.what and options.what.endswith((".yaml", ".yml")) else None
    if options.what != config:
        if options.model is not None:
            raise RequestError("Name the model once, with --model or without.")
        options.model = options.what
    if options.in_process:
        if config or options.profile or options.print_config:
            raise RequestError("--in-process takes no config and no profile: the flags say it all.")
        return _serve_in_process(options)
    for name in _IN_PROCESS_ONLY:
        if getattr(options, name) is not None:
            flag = "--load-" + options.quantization if name == "quantization" else "--" + name.replace("_", "-")
            raise RequestError(f"{flag} goes with --in-process; for Ray it stands in the config.")
    if config and not Path(config).is_file():
        raise RequestError(f"There is no config {config}.")
    return _serve_on_ray(options, config)


def _serve_on_ray(options: argparse.Namespace, config: str | None) -> NoReturn:
    """Becomes the process that serves, so that signals and the exit status are its own; it checks all else first.

    Not Ray's `serve run`: on Ctrl-C that ends the proxy first, and with it the answers on their way.
    """
    try:
        command = [sys.executable, "-m", f"{application_package()}.tools.serve"]
    except ImportError as error:
        raise RequestError(str(error)) from None
    given = {"config": config} | {name: getattr(options, name) for name in _PASSED_ON}
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    command += ["--print-config"] if options.print_config else []
    os.execv(sys.executable, command)


def _serve_in_process(options: argparse.Namespace) -> int:
    """Takes the port first: a model is not loaded in vain."""
    with bound_socket(options.host or "127.0.0.1", 8000 if options.port is None else options.port) as bound:
        model = flags.model_options(options)
        from llava_serve.api.keys import accepted_keys
        from llava_serve.config import ApiOptions, EngineOptions

        api = ApiOptions(api_keys=tuple(options.api_key or ()), api_keys_file=options.api_key_file)
        accepted_keys(api)  # a file that cannot be used is told here
        import uvicorn

        from llava_serve.api.app import create_app
        from llava_serve.api.in_process import InProcessBackend
        from llava_serve.async_llm import AsyncLLM

        llm = AsyncLLM(model, EngineOptions(compile=bool(options.compile)))
        backend = InProcessBackend(llm)
        app = create_app(backend, api)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        host, port = bound.getsockname()[:2]
        bound.listen()  # who reads the next line can connect
        print(f"Serving {backend.model_name} on http://{host}:{port}  (Ctrl-C drains and ends)", flush=True)
        # uvicorn drains on a signal and then raises it again, when there is nothing left to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        server.run(sockets=[bound])
        llm.close()
    return 0
