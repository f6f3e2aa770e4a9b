"""API keys: where they come from, and how they change while the server runs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.app import AppArgs
from deployments.tools.check_config import check
from deployments.tools.config import parse_config
from llava_serve.api.keys import KEYS_VARIABLE, LOOK_INTERVAL_S, KeyFile, accepted_keys, read_keys
from llava_serve.config import ApiOptions
from llava_serve.errors import RequestError
from support.api_keys import KEY, OTHER, Clock, bearer
from support.api_server import PacedBackend, app_over, wait_until


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (KEY, f"key-{digest(KEY)[:8]}"),
        (f"  {KEY}\t", f"key-{digest(KEY)[:8]}"),
        (f"web-team:{KEY}", "web-team"),
        (f"jo@example.org:sha256:{digest(KEY)}", "jo@example.org"),
        (f"jo:sha256:{digest(KEY).upper()}", "jo"),
        (f"sha256:{digest(KEY)}", f"key-{digest(KEY)[:8]}"),
    ],
)
def test_the_forms_of_a_key(line: str, name: str) -> None:
    assert read_keys(["# teams", "", line], "here") == {bytes.fromhex(digest(KEY)): name}


@pytest.mark.parametrize(
    "line",
    [
        "web:",
        f":{KEY}",
        f"a name:{KEY}",
        f"web:{KEY} {OTHER}",
        f"{KEY} # Jo",
        "jo:sha256:",
        f"jo:sha256:{digest(KEY)[2:]}",
        "sha256:secret-word",
        f"{'n' * 65}:{KEY}",
        f"\ufeff{KEY}",
        f"web:{KEY}\0",
        "\0".join(KEY),
    ],
)
def test_a_line_that_is_no_key_is_named_by_its_number_and_not_quoted(line: str) -> None:
    with pytest.raises(RequestError) as refusal:
        read_keys([KEY, line], "here")
    assert str(refusal.value) == "here: key 2 is not KEY, name:KEY or name:sha256:HEX."


def test_a_key_may_hold_colons_after_its_name() -> None:
    assert read_keys(["web:a:b"], "here") == {bytes.fromhex(digest("a:b")): "web"}


def test_the_environment_has_the_same_forms() -> None:
    keys = accepted_keys(ApiOptions(), {KEYS_VARIABLE: f"# mine\n{KEY}, web:{OTHER}\n"})
    assert keys is not None
    assert keys.name_of(OTHER.encode()) == "web"
    assert keys.name_of(KEY.encode()) == f"key-{digest(KEY)[:8]}"
    assert keys.name_of(b"web") is None
    assert accepted_keys(ApiOptions(), {}) is None


@pytest.mark.parametrize("text", ["\ufeffweb:{}\n", "\ufeff# mine\r\nweb:{}\r\n", "web:{}"])
def test_a_file_that_windows_wrote(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_bytes(text.format(KEY).encode())
    assert KeyFile(tmp_path / "keys").names() == read_keys([f"web:{KEY}"], "")


@pytest.mark.parametrize("empty", ["", ",", "# none\n"])
def test_a_source_without_a_key_lets_nobody_in(tmp_path: Path, empty: str) -> None:
    with pytest.raises(RequestError, match="LLAVA_API_KEYS holds no key"):
        accepted_keys(ApiOptions(), {KEYS_VARIABLE: empty})
    (tmp_path / "keys").write_text(empty.replace(",", ""))
    with pytest.raises(RequestError, match="holds no key"):
        accepted_keys(ApiOptions(api_keys_file=str(tmp_path / "keys")), {KEYS_VARIABLE: KEY})


def test_a_changed_file_is_read_again_within_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(f"web:{KEY}\n")
    first = path.stat()
    file = KeyFile(path, clock)
    path.write_text(f"web:{OTHER}\n")
    os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns))  # as where the time of files moves on in steps
    clock.now += LOOK_INTERVAL_S / 2
    assert file.names() == read_keys([f"web:{KEY}"], "")  # not looked at yet
    clock.now += LOOK_INTERVAL_S / 2
    assert file.names() == read_keys([f"web:{OTHER}"], "")


def test_a_new_file_that_stays_is_not_reported_as_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(f"web:{KEY}\n")
    file = KeyFile(path, clock)
    caplog.set_level(logging.INFO)
    for _ in range(3):
        clock.now += LOOK_INTERVAL_S
        assert file.names() == read_keys([f"web:{KEY}"], "")
    assert not caplog.records


def test_a_secret_of_kubernetes_that_swaps_its_link_is_read_again(tmp_path: Path) -> None:
    """The kubelet writes a new folder, and renames a link to it over the old link."""
    clock = Clock()

    def publish(version: str, text: str) -> None:
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(text)
        os.utime(tmp_path / version / "keys", (0, 0))  # the time and the size say nothing
        (tmp_path / "new").symlink_to(version)
        (tmp_path / "new").rename(tmp_path / "..data")

    publish("..1", f"web:{KEY}")
    (tmp_path / "keys").symlink_to("..data/keys")
    file = KeyFile(tmp_path / "keys", clock)
    publish("..2", f"web:{OTHER}")
    clock.now += LOOK_INTERVAL_S
    assert file.names() == read_keys([f"web:{OTHER}"], "")


def gone(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_text("")


def garbled(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


def malformed(path: Path) -> None:
    path.write_text(f"web:{OTHER} secret words\n")


@pytest.mark.parametrize("spoil", [gone, empty, garbled, malformed])
def test_a_file_that_becomes_useless_keeps_its_last_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(f"web:{KEY}\n")
    file = KeyFile(path, clock)
    spoil(path)
    for _ in range(5):
        clock.now += LOOK_INTERVAL_S
        assert file.names() == read_keys([f"web:{KEY}"], "")
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"The file of API keys {path}")
    assert "stay valid" in record.getMessage()
    assert "secret words" not in record.getMessage()
    path.unlink(missing_ok=True)
    path.write_text(f"web:{OTHER}\n")
    clock.now += LOOK_INTERVAL_S
    assert file.names() == read_keys([f"web:{OTHER}"], "")


def test_keys_change_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"web:{KEY}\n")
    with app_over(PacedBackend(), api_keys_file=str(path)) as web:
        assert web.get("/v1/models", headers=bearer(KEY)).status_code == 200
        assert web.get("/v1/models", headers=bearer(OTHER)).status_code == 401
        path.write_text(f"web:sha256:{digest(OTHER)}\n")
        wait_until(lambda: web.get("/v1/models", headers=bearer(OTHER)).status_code == 200)
        assert web.get("/v1/models", headers=bearer(KEY)).status_code == 401


def test_no_key_is_printed(tmp_path: Path) -> None:
    options = ApiOptions(api_keys=(KEY,))
    keys = accepted_keys(options)
    assert keys is not None
    assert KEY not in repr(options) + repr(keys) + str(vars(keys))
    for wrong in ({"api_keys": [KEY, 1]}, {"api_keys": {KEY: 1}}, {KEY: 1, "api_keys": KEY}):
        with pytest.raises(ValidationError) as error:
            ApiOptions.model_validate(wrong)
        assert KEY not in str(error.value).replace(f"\n{KEY}\n", "")  # but where it is the name of an option


def test_keys_in_the_config_are_refused_on_ray(tmp_path: Path) -> None:
    """Serve logs the application's arguments."""
    config: dict[str, Any] = parse_config()
    config["applications"][0]["args"]["api"]["api_keys"] = [KEY]
    [fault] = check(config)
    assert "Ray logs" in fault
    assert "api_keys_file" in fault
    assert KEYS_VARIABLE in fault
    assert KEY not in fault
    with pytest.raises(ValidationError) as error:
        AppArgs.model_validate(config["applications"][0]["args"])
    assert KEY not in str(error.value)
