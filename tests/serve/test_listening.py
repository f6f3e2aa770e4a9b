"""Who reaches the server: a key is required beyond this machine, and the start says what listens where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.tools.config import ConfigError, check_address, parse_config
from deployments.tools.listening import listening
from deployments.tools.local_cluster import free_port
from llava_serve.api.keys import KEYS_VARIABLE
from llava_serve.cli.ports import OPEN_VARIABLE, is_loopback


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


@pytest.mark.parametrize("variable", [(KEYS_VARIABLE, "web:sesame"), (OPEN_VARIABLE, "1"), None])
def test_beyond_this_machine_a_key_is_required_or_the_word_that_none_is(
    variable: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("sesame\n")
    if variable is not None:
        monkeypatch.setenv(*variable)
        check_address(parse_config(host="0.0.0.0", port=free_port()))
        return
    check_address(parse_config(host="0.0.0.0", port=free_port(), api_keys_file=str(tmp_path / "keys")))
    check_address(parse_config(port=free_port()))
    unset = parse_config(port=free_port())
    del unset["http_options"]["host"]  # Serve's own default is every interface
    for config in (parse_config(host="0.0.0.0", port=free_port()), unset):
        with pytest.raises(ConfigError) as refusal:
            check_address(config)
        for way_out in ("--api-key-file FILE", KEYS_VARIABLE, "listen on 127.0.0.1", f"{OPEN_VARIABLE}=1"):
            assert way_out in str(refusal.value)


@pytest.mark.parametrize("value", ["", "0", "true"])
def test_only_1_opens(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPEN_VARIABLE, value)
    with pytest.raises(ConfigError):
        check_address(parse_config(host="0.0.0.0", port=free_port()))


def test_the_default_profile_serves_this_machine_alone_and_says_so(served: Any) -> None:
    lines = listening(served.process.pid, served.ports)
    others, this = (
        lines.index(next(line for line in lines if "Other machines" in line)),
        lines.index("Only this machine reaches:"),
    )
    reachable = lines[others + 1 : this]
    # Ray has no setting for these; they require its token.
    assert [line.split(":")[0] for line in reachable] == ["  replicas' gRPC (token), and HTTP behind HAProxy"]
    assert f"  HTTP: {served.url.removeprefix('http://')}" in lines[this:]
    assert "  Ray's control service (token)" in {line.split(":")[0] for line in lines[this:]}
