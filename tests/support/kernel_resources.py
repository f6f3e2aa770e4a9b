"""Compiles the kernels for GPUs of compute capability 9.0, without one, and prints what each takes, as lines of JSON.

Run as a program of its own: kernels that the interpreter runs cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llava_serve.engine.executor.kernels import decode_attention, layers, top_p

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HALF, FLOAT, FLOAT8, INT, LONG = "*bf16", "*fp32", "*fp8e4nv", "i32", "i64"


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Name, kernel, types of its arguments, constants, and warps, as the launchers give them for a model of 7 billion
    parameters and others."""
    norm = {"delta": HALF, "residual": HALF, "weight": HALF, "out": HALF, "width": INT, "eps": "fp32"}
    yield "add_rmsnorm", layers.add_rmsnorm_kernel, norm, {"has_delta": True, "block": 4096}, 8
    rotary = {**dict.fromkeys(("qkv", "cos", "sin"), HALF), "slots": "*i64"}
    rotary |= {**dict.fromkeys(("query", "keys", "values"), HALF), "scales": FLOAT}
    rotary |= dict.fromkeys(("qkv_stride", "cos_stride", "kv_head_stride", "kv_stride"), LONG)
    constants: dict[str, Any] = {"heads": 32, "kv_heads": 32, "head_dim": 128, "has_scales": False, "block": 64}
    yield "rotate_and_write", layers.rotate_and_write_kernel, rotary, constants, 1
    in_float8 = dict.fromkeys(("keys", "values"), FLOAT8)
    constants = constants | {"has_scales": True}
    yield "rotate_and_write fp8", layers.rotate_and_write_kernel, rotary | in_float8, constants, 1
    yield "silu_mul", layers.silu_mul_kernel, {"gate_up": HALF, "out": HALF, "width": INT}, {"block": 1024}, 4
    attend = {**dict.fromkeys(("query", "keys", "values"), HALF), "table": "*i32", "used": "*i32", "slopes": FLOAT}
    attend |= {"scales": FLOAT, "partial": FLOAT, "lse": FLOAT, "scaling": "fp32"}
    attend |= dict.fromkeys(("query_stride", "query_head_stride", "kv_head_stride", "kv_stride", "table_stride"), LONG)
    for (name, heads, kv_heads, head_dim, window, alibi), float8 in itertools.product(
        (
            ("attend llama", 32, 32, 128, 0, False),
            ("attend mistral", 32, 8, 128, 4096, False),
            ("attend yi", 56, 8, 128, 0, False),
            ("attend mpt", 32, 32, 128, 0, True),
            ("attend 64", 14, 2, 64, 0, False),
            ("attend 256", 8, 1, 256, 0, False),
        ),
        (False, True),
    ):
        if float8 and (window or alibi or heads > 32):  # what these add does not depend on it
            continue
        block = triton.next_power_of_2(head_dim)
        sizes = {"heads": heads, "group": heads // kv_heads, "head_dim": head_dim, "page_size": 16, "window": window}
        sizes |= {"has_slopes": alibi, "has_scales": float8, "block_heads": 16, "block_dim": block}
        sizes["block_keys"] = decode_attention.tile_keys(block, 2, float8=float8)
        types = attend | in_float8 if float8 else attend
        yield f"{name}{' fp8' * float8}", decode_attention.attend_kernel, types, sizes, 4
    merge = {"partial": FLOAT, "lse": FLOAT, "out": HALF}
    sizes = {"heads": 32, "head_dim": 128, "splits": decode_attention.splits_of(32), "block_dim": 128}
    yield "merge", decode_attention.merge_kernel, merge, sizes, 1
    sample = {"logits": FLOAT, "top_p": FLOAT, "noise": "*fp64", "out": "*i64", "stride": LONG, "vocabulary": INT}
    sizes = {"block": top_p._BLOCK, "ways": top_p._WAYS, "passes": top_p._PASSES}
    yield "sample_top_p", top_p.sample_top_p_kernel, sample, sizes, 16


def resources(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory of a compiled kernel, and its loads from global memory."""
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(place(name),): value for name, value in constants.items()},
        # what Triton finds out of arguments when it launches: addresses and strides are multiples of 16
        attrs={(place(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "fp32"},
    )
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": 3})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage, code = (
            subprocess.run([TOOLS / command[0], *command[1:], binary.name], capture_output=True, text=True, check=True)
            for command in (["cuobjdump", "-res-usage"], ["nvdisasm"])
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, usage
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", code.stdout)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "shared": compiled.metadata.shared,
        "loads": len(loads),
        "wide_loads": sum(".128" in one for one in loads),
    }


if __name__ == "__main__":
    for name, *given in kernels():
        sys.stdout.write(json.dumps({"name": name, **resources(*given)}) + "\n")
