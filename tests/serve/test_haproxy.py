"""The program that starts HAProxy completes what this Ray writes, and refuses what it does not know."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig

from deployments.tools.haproxy import write_launcher
from deployments.tools.local_cluster import free_ports


@dataclass
class Haproxy:
    """HAProxy's configuration, as Ray writes it, and the program."""

    config: Path
    program: Path

    def check(self) -> subprocess.CompletedProcess[str]:
        """Lets the program check the configuration instead of starting HAProxy with it."""
        command = [str(self.program), "-c", "-f", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def ports() -> list[int]:
    return free_ports(2)


@pytest.fixture
def haproxy(tmp_path: Path, ports: list[int]) -> Haproxy:
    """Without routes."""
    written = Haproxy(tmp_path / "haproxy.cfg", tmp_path / "program")
    options = HAProxyConfig(socket_path=str(tmp_path / "a.sock"), stats_port=ports[0], metrics_port=ports[1])
    HAProxyApi(options, config_file_path=str(written.config))._generate_config_file_internal()
    write_launcher(written.program, ports)
    return written


def test_what_ray_writes_is_completed_once(haproxy: Haproxy, ports: list[int]) -> None:
    for _ in range(2):  # the program starts anew with what it has completed, or with what Ray writes anew
        done = haproxy.check()
        assert done.returncode == 0, done.stderr
        lines = [line.strip() for line in haproxy.config.read_text().splitlines()]
        assert len([line for line in lines if line.startswith("timeout http-request ")]) == 1
        assert [line for line in lines if line.startswith("errorfile ")] == [
            f"errorfile {status} {haproxy.program}.503" for status in (502, 503, 504)
        ]
        assert {f"bind 127.0.0.1:{port}" for port in ports} <= set(lines)
        assert "http-request deny deny_status 503" in lines


def test_a_path_without_a_route_is_not_found_once_there_are_routes(haproxy: Haproxy, tmp_path: Path) -> None:
    routes = {"llava": BackendConfig(name="llava", path_prefix="/", app_name="llava", protocol=RequestProtocol.HTTP)}
    options = HAProxyConfig(socket_path=str(tmp_path / "a.sock"))
    HAProxyApi(options, routes, str(haproxy.config))._generate_config_file_internal()
    write_launcher(haproxy.program)
    done = haproxy.check()
    assert done.returncode == 0, done.stderr
    assert "http-request return status 404" in haproxy.config.read_text()


@pytest.mark.parametrize(
    ("of_ray", "of_another_ray", "what"),
    [
        ("timeout client ", "timeout client-hello ", "the time for a request's head"),
        ("errorfile 503 ", "# errorfile 503 ", "what it answers itself"),
        ("http-request return status 404", "http-request return status 410", "the answer while it has no routes"),
        ("    bind :", "    bind [::]:", "the address of port"),
        ("  bind *:", "  bind [::]:", "the address of port"),
    ],
)
def test_it_does_not_start_with_a_configuration_that_it_cannot_complete(
    haproxy: Haproxy, of_ray: str, of_another_ray: str, what: str
) -> None:
    written = haproxy.config.read_text()
    assert of_ray in written
    haproxy.config.write_text(written.replace(of_ray, of_another_ray))
    done = haproxy.check()
    assert done.returncode == 1
    assert done.stderr.startswith("HAProxy does not start: this Ray configures it otherwise than Ray 2.60, and " + what)
    assert done.stderr.count("\n") == 1
