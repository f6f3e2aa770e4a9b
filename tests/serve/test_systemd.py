"""The example's unit of systemd."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.tools.config import packaged
from llava_serve.cli.serve_config import parse_serve_config
from support.paths import ROOT

UNIT = ROOT / "examples" / "llava-serve.service"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, and there is none")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/llava-serve/bin/llava-serve", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_requests_in_flight_may_end_and_the_log_goes_to_the_journal() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    [application] = parse_serve_config(packaged("serve_config.yaml"))["applications"]
    assert int(service["TimeoutStopSec"]) > application["args"]["api"]["max_timeout_s"]
    assert service["KillMode"] == "mixed"
    assert service["ExecStart"].endswith(" --log -")
