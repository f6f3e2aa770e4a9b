"""Compiles a kernel in C++ at its first use, for the processor that it runs on: in seconds."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from ctypes import CDLL
from pathlib import Path

import torch
from torch._inductor import config as inductor

from llava_serve.engine.executor.float8_cache import FLOAT8

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", FLOAT8: "float8"}
"""Of queries and of what is stored, by their names in the code."""

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),  # for vectors; NaN stays NaN
)
_TIMEOUT_S = 60


def compiler() -> str | None:
    """The C++ compiler, which torch.compile uses, too; None if there is none."""
    return shutil.which(inductor.cpp.cxx[-1])


def build(source: str, **values: str | int) -> CDLL:
    """Compiles and loads a file of this folder.

    Args:
        source: its name.
        values: what the file leaves to the command line, by its names there.

    Raises:
        RuntimeError, OSError: it cannot be compiled here, or not be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        defines = [f"-D{name}={value}" for name, value in values.items()]
        command = [compiler() or "", *_FLAGS, *defines, str(_FOLDER / source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, timeout=_TIMEOUT_S, capture_output=True)
        except subprocess.SubprocessError as error:
            raise RuntimeError("the C++ compiler does not compile it") from error
        return CDLL(str(library))


def heads_of(query: torch.dtype, stored: torch.dtype, head_dim: int, group: int) -> dict[str, str | int]:
    """What attention leaves to the command line: types of `TYPES`, the width of a head, query heads per kv head."""
    return {"QUERY": TYPES[query], "STORED": TYPES[stored], "HEAD_DIM": head_dim, "GROUP": group}
