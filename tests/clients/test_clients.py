"""Real clients, installed and unchanged, against a running server; docs/clients.md shows what they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.clients import CLIENTS, INSTALL_S, RUN_S, Client, NotInstalledError, drive, installed
from support.recorded_clients import DOCUMENT, row
from support.served_command import serve_in_process

BY_ID = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.id)


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with serve_in_process("builtin", "--port", 0, named="builtin") as (url, _):
        yield url


@pytest.fixture(scope="module")
def environments(pytestconfig: pytest.Config) -> Path:
    """Kept between runs; `make clean` removes it."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("clients")


@pytest.mark.slow
@pytest.mark.timeout(3 * INSTALL_S + RUN_S + 60)
@BY_ID
def test_the_client_works(client: Client, server_url: str, environments: Path) -> None:
    try:
        folder = installed(client, environments)
    except NotInstalledError as error:
        pytest.skip(f"{client.packages[0]} cannot be installed: {error}")
    problems, errors = drive(client, folder, server_url)
    assert problems == dict.fromkeys(client.checks, ""), errors


@BY_ID
def test_the_document_shows_the_client(client: Client) -> None:
    start = row(client, "")[:-2]
    assert [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith(start)], start


def test_the_document_shows_no_other_client() -> None:
    rows = [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == len(CLIENTS) + 1  # and the head
