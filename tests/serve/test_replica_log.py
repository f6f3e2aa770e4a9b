"""What the library logs goes to Serve's log of the replica, as Serve's `logging_config` has it."""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.logging_utils import configure_component_logger, configure_default_serve_logger
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.schema import LoggingConfig

from deployments.handle_calls import SERVE_LOGGER
from deployments.replica import begin_replica, log_with_serve
from support.cluster import replica_logs


@pytest.fixture
def library() -> Iterator[logging.Logger]:
    """A logger in place of the library's."""
    yield logging.getLogger("library")
    close_files()
    configure_default_serve_logger()


def close_files() -> None:
    """Serve leaves them open."""
    for handler in logging.getLogger(SERVE_LOGGER).handlers:
        if isinstance(handler, logging.handlers.MemoryHandler) and handler.target is not None:
            handler.target.close()


def configure(folder: Path, **logging_config: Any) -> None:
    """As Serve does it when a replica starts, and when its `logging_config` changes."""
    close_files()
    configure_component_logger(
        component_name="llava_Tier",
        component_id="one",
        logging_config=LoggingConfig(logs_dir=str(folder), **logging_config),
        max_bytes=1 << 20,
        backup_count=1,
    )


def lines(folder: Path) -> list[str]:
    [file] = folder.iterdir()
    return file.read_text().splitlines()


def test_a_replicas_log_has_the_librarys_lines_once_in_its_form_and_from_its_level_on(
    library: logging.Logger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = logging.getLogger(f"{library.name}.engine")
    configure(tmp_path / "text")
    log_with_serve(library)
    log_with_serve(library)  # as a second deployment in the same process would
    part.info("on %s", "cpu")
    part.debug("not yet")
    token = _serve_request_context.set(_RequestContext(request_id="trace-me"))
    configure(tmp_path / "quiet", enable_access_log=False)
    part.info("within a request")
    configure(tmp_path / "json", encoding="JSON", log_level="DEBUG")
    part.debug("within a request")
    _serve_request_context.reset(token)
    [text], [quiet], [structured] = (
        lines(tmp_path / "text"),
        lines(tmp_path / "quiet"),
        map(json.loads, lines(tmp_path / "json")),
    )
    assert re.fullmatch(r"INFO \S+ \S+ llava_Tier one -- on cpu", text)
    assert re.fullmatch(r"INFO \S+ \S+ llava_Tier one trace-me -- within a request", quiet)
    assert (structured["message"], structured["levelname"]) == ("within a request", "DEBUG")
    assert (structured["request_id"], structured["component_id"]) == ("trace-me", "one")
    assert caplog.records == []  # what the root logger has got


def test_outside_of_a_replica_the_log_stays_as_it_is() -> None:
    library = logging.getLogger("llava_serve")
    before = (library.level, library.propagate, library.handlers[:])
    begin_replica()
    assert (library.level, library.propagate, library.handlers) == before


def test_a_running_application_logs_what_it_has_loaded(served: Any) -> None:
    assert re.search(
        r"^INFO \S+ \S+ llava_LlavaModel \S+ -- builtin is on \S+ in \S+\.$", replica_logs(served, "LlavaModel"), re.M
    )
    assert re.search(r"^INFO .+ -- builtin: template .+, because ", replica_logs(served, "ImagePreprocessor"), re.M)
