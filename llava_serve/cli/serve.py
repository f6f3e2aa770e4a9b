"""`llava-serve serve`: the Serve application on Ray, or the web app alone in this process."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llava_serve.cli import options as flags
from llava_serve.cli.ports import bound_socket, check_open
from llava_serve.errors import RequestError
from llava_serve.ray_application import application_package

if TYPE_CHECKING:
    from llava_serve.app_options import AppOptions

_PASSED_ON = ("model", "host", "port", "api_key_file", "profile", "dashboard", "log")
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
    "log_format",
    "trace_exporter",
)
"""On Ray they stand in the config. A key would get into Ray's log there, too; its file's path does no harm."""


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Start the application of a Serve config on Ray, or with --in-process the web app alone.",
        **flags.examples(
            "llava-serve serve /models/llava-v1.5-7b --port 9000",
            "llava-serve serve mine.yaml --profile production --host 0.0.0.0 --api-key-file keys.txt",
            "llava-serve serve --in-process --device cuda:1 /models/llava-v1.5-7b",
        ),
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="MODEL_OR_CONFIG",
        help="a model, or a Serve config (*.yaml) instead of the packaged one",
    )
    parser.add_argument("--in-process", action="store_true", help="serve in this process, without Ray")
    flags.add_model_flags(parser)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="on a CPU, run the decoder through torch.compile from the start, or never; by default it is compiled in "
        "the background, while the server answers",
    )
    parser.add_argument("--host", help="address to listen on; 127.0.0.1 by default, 0.0.0.0 for the network")
    parser.add_argument("--port", type=int, help="port to listen on; 8000 by default, 0 for a free one")
    parser.add_argument("--api-key", action="append", metavar="KEY", help="require this API key; repeatable")
    parser.add_argument("--api-key-file", metavar="FILE", help="require one of the API keys in a file, one a line")
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        help="of the log on standard error, with a line for each request: text by default",
    )
    parser.add_argument(
        "--trace-exporter",
        metavar="MODULE:FUNCTION",
        help="send spans of requests with this exporter; llava_serve.tracing:otlp sends them by OTLP",
    )
    parser.add_argument("--profile", type=Path, help="settings of Serve's proxy and transport: production, or a file")
    parser.add_argument(
        "--dashboard", type=int, nargs="?", const=8265, metavar="PORT", help="start Ray's dashboard, too"
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="add the output of Ray and the replicas to a file, or with - to standard output",
    )
    parser.add_argument("--print-config", action="store_true", help="print the packaged config, to start your own")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serves until a signal ends it."""
    config = options.what if options.what and options.what.endswith((".yaml", ".yml")) else None
    if options.what != config:
        if options.model is not None:
            raise RequestError("Name the model once, with --model or without.")
        options.model = options.what
    if options.in_process:
        if options.profile or options.print_config or options.dashboard or options.log:
            raise RequestError("--in-process takes no profile, dashboard or log file, and prints no config.")
        return _serve_in_process(options, config)
    for name in _IN_PROCESS_ONLY:
        if getattr(options, name) is not None:
            flag = "--load-" + options.quantization if name == "quantization" else "--" + name.replace("_", "-")
            raise RequestError(f"{flag} goes with --in-process; with Ray, set it in the config.")
    if config and not Path(config).is_file():
        raise RequestError(f"There is no config {config}.")
    return _serve_on_ray(options, config)


def _serve_on_ray(options: argparse.Namespace, config: str | None) -> NoReturn:
    """Becomes the process that serves, so that signals and the exit status are its own; it checks all else first.

    Not Ray's `serve run`: on Ctrl-C that ends the proxy first, and with it the requests in flight.
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


def _serve_in_process(options: argparse.Namespace, config: str | None) -> int:
    """Binds the port first, so that a port in use fails before a model is loaded."""
    app_options, host, port = _in_process_options(options, config)
    with bound_socket(host, port) as listener:
        from llava_serve.api.keys import accepted_keys
        from llava_serve.checkpoints import open_checkpoint

        model, api = app_options.model_options, app_options.api
        open_checkpoint(model).limited_to(app_options.engine.max_model_len)
        check_open(host, has_keys=accepted_keys(api) is not None)  # keys that cannot be used are reported here, too
        from llava_serve.api.app import create_app
        from llava_serve.api.http_server import server_of
        from llava_serve.api.in_process import InProcessBackend
        from llava_serve.api.limiter import limiter_of
        from llava_serve.api.parse_process import ParseProcess
        from llava_serve.async_llm import AsyncLLM
        from llava_serve.cli.log import log_to_stderr
        from llava_serve.probe import check_probes
        from llava_serve.tracing import export_by

        log_to_stderr(options.log_format or "text")
        if options.trace_exporter is not None:
            export_by(options.trace_exporter)
        llm = AsyncLLM(model, app_options.engine, image_options=app_options.images.isolated)
        check_probes(llm, app_options.probe)
        backend = InProcessBackend(llm, api.model_name)
        with ParseProcess() as parse:
            limiter = limiter_of(api, backend.exporter)
            server = server_of(create_app(backend, api, limiter, offload=parse), limiter=limiter)
            host, port = listener.getsockname()[:2]
            listener.listen()  # whoever reads the next line can connect
            print(f"Serving {backend.model_name} on http://{host}:{port}  (Ctrl-C drains and ends)", flush=True)
            print(f"Metrics: http://{host}:{port}/metrics", flush=True)
            server.run(sockets=[listener])
        llm.close()
    return 0


def _in_process_options(options: argparse.Namespace, config: str | None) -> tuple[AppOptions, str, int]:
    """The options, the host and the port of a config, or the defaults; with those of flags instead."""
    from llava_serve.app_options import AppOptions
    from llava_serve.cli.serve_config import address_of, app_options, read_serve_config
    from llava_serve.config import ModelOptions

    changes: dict[str, Any] = flags.given(options, *ModelOptions.model_fields)
    if options.compile is not None:
        changes["engine"] = {"compile": options.compile}
    keys = {"api_keys": options.api_key, "api_keys_file": options.api_key_file}
    if given := {name: value for name, value in keys.items() if value is not None}:
        changes["api"] = given
    if config is None:
        app, host, port = AppOptions(**changes), "127.0.0.1", 8000
    else:
        read = read_serve_config(Path(config))
        app, (host, port) = app_options(read, config, changes), address_of(read)
    host, port = options.host or host, port if options.port is None else options.port
    if not isinstance(host, str) or not isinstance(port, int):
        raise RequestError(f"{config}: http_options.host must be a string, and http_options.port a number.")
    return app, host, port
