"""Runs the steps of the Dockerfile by `chroot`, in namespaces of their own: what a machine without an engine can.

The base is Debian's own Python, not the image that the Dockerfile names. Layers, caches and labels are left out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.paths import ROOT

NEEDED = ("mmdebstrap", "unshare", "chroot")

_BASE_PACKAGES = "python3-dev,python3-venv,ca-certificates"


@dataclass
class Stage:
    """Attributes:
    root: its files.
    variables: those of `ENV` and `ARG`.
    cwd: of `WORKDIR`.
    user: of `USER`, as UID:GID.
    entrypoint: of `ENTRYPOINT`.
    health: of `HEALTHCHECK`.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"})
    cwd: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def command(self, *program: str, binds: Mapping[str, Path] | None = None, read_only: bool = False) -> list[str]:
        """Runs a program in the stage; it ends with all of its processes. With `read_only` only /tmp can be written."""
        root = shlex.quote(str(self.root))
        lines = [f"mount --bind {root} {root}"]
        lines += (
            ["mount -o remount,bind,ro " + root, f"mount -t tmpfs -o mode=1777 tmp {root}/tmp"] if read_only else []
        )
        lines += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for target, source in (binds or {}).items():
            lines.append(f"mount --bind {shlex.quote(str(source))} {root}/{shlex.quote(target)}")
        inside = ["sh", "-c", f'cd {shlex.quote(self.cwd)} && exec "$@"', "sh", *program]
        lines.append(f"exec chroot --userspec={self.user} {root} {shlex.join(inside)}")
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(lines)]


def make_base(folder: Path) -> Path:
    """A root with Debian's Python as `python`, and pip."""
    packages = f"--include={_BASE_PACKAGES}"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(folder)], check=True)
    subprocess.run(["chroot", str(folder), "python3", "-m", "venv", "/usr/local"], check=True)
    return folder


def build(target: str, folder: Path, arguments: Mapping[str, str], machine: Mapping[str, Path]) -> Stage:
    """Runs the steps of a target and of the stages that it needs.

    Args:
        target: a stage's name.
        folder: gets the roots.
        arguments: of the build.
        machine: what every step finds at which path, such as the certificates of this machine.
    """
    base = make_base(folder / "base")
    stages: dict[str, Stage] = {}
    stage = Stage(base)
    for instruction, value in instructions():
        if instruction == "FROM":
            if target in stages:
                break
            source, _, name = value.split()
            before = stages.get(source)
            stage = Stage(folder / name) if before is None else before
            if before is None:
                subprocess.run(["cp", "-a", base, stage.root], check=True)
            stages[name] = stage
        elif stages:
            _step(stage, instruction, value, stages, arguments, machine)
    return stages[target]


def instructions() -> Iterator[tuple[str, str]]:
    """Those of the Dockerfile, each on one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    for line in re.sub(r"\\\n *", "", "\n".join(lines)).splitlines():
        if line:
            instruction, value = line.split(maxsplit=1)
            yield instruction, value


def _step(
    stage: Stage,
    instruction: str,
    value: str,
    stages: Mapping[str, Stage],
    arguments: Mapping[str, str],
    machine: Mapping[str, Path],
) -> None:
    match instruction:
        case "ARG":
            name, _, default = value.partition("=")
            stage.variables[name] = arguments.get(name, default.strip('"'))
        case "ENV":
            stage.variables |= dict(part.split("=", 1) for part in shlex.split(value))
        case "WORKDIR":
            stage.cwd = value
            (stage.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = value
        case "ENTRYPOINT":
            stage.entrypoint = json.loads(value)
        case "HEALTHCHECK":
            stage.health = json.loads(value.partition("CMD ")[2])
        case "COPY":
            *sources, target = value.split()
            for name in sources:
                _copy(ROOT / name, stage.root / stage.cwd.lstrip("/") / target, whole=len(sources) > 1)
        case "RUN":
            _run(stage, value, stages, machine)


def _copy(source: Path, target: Path, *, whole: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target / source.name if whole else target)


def _run(stage: Stage, value: str, stages: Mapping[str, Stage], machine: Mapping[str, Path]) -> None:
    binds = dict(machine)
    while found := re.match(r"--mount=(\S+)\s+", value):
        value = value[found.end() :]
        mount = dict(part.split("=", 1) for part in found[1].split(","))
        if mount["type"] == "bind":
            where = stages[mount["from"]].root if "from" in mount else ROOT
            binds[mount["target"].lstrip("/")] = where / mount["source"].lstrip("/")
    for target, source in binds.items():
        place = stage.root / target
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True) if source.is_dir() else place.touch()
    passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    command = stage.command("sh", "-c", value, binds=binds)
    done = subprocess.run(command, env=passed | stage.variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"RUN {value}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
