"""Absurd numbers and files are refused as a checkpoint is opened: by file and key, at once, and without the memory."""

from __future__ import annotations

import json
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.bounds import FILE_BYTES, TOKENIZER_BYTES
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from support.paths import CHECKPOINTS
from support.variants import TOWER, copy, edit, refusal

AT_ONCE_S = 1.0
"""Of processor time, which other work on the machine adds little to. It takes some milliseconds."""
MEMORY = 16 << 20

CONFIG: dict[str, tuple[Any, str]] = {
    "hidden_size": (10**9, "1000000000"),
    "num_hidden_layers": (10**6, "1 and 512"),
    "vocab_size": (10**12, "1 and 4,194,304"),
    "intermediate_size": (-1, "'-1'"),
    "num_attention_heads": (0, "1 and 4,096"),
    "num_key_value_heads": (3, "divisor of num_attention_heads 4"),
    "max_position_embeddings": (2**60, "1 and 16,777,216"),
    "head_dim": (True, "'True'"),
    "rms_norm_eps": (float("nan"), "'nan'"),
    "rope_theta": (float("inf"), "'inf'"),
    "rope_scaling": ({"type": "linear", "factor": 1e300}, "rope_scaling.factor"),
    "sliding_window": ("4096", "whole number"),
    "mm_hidden_size": (10**9, "mm_hidden_size"),
    "mm_projector_type": ("mlp1000000000x_gelu", "mlpNx_gelu"),
    "image_grid_pinpoints": ([[10**9, 10**9]], "each a whole number between 1 and 8,192"),
    "image_grid_pinpoints of many": ([[336, 336]] * 1001, "at most 1000 pairs"),
    "image_grid_pinpoints of text": ("-" * 100_000 + "1", "image_grid_pinpoints"),
    "image_grid_pinpoints of a range": ("(1x1),...,(99x99)", "at most 1000 pairs"),
    "image_grid_pinpoints of a long range": (f"(1x1),...,({10**6}x{10**6})", "no list of (width, height)"),
    "image_aspect_ratio": ("anyres_max_0", "anyres_max_N"),
    "image_aspect_ratio of many digits": ("anyres_max_" + "9" * 500, "anyres_max_N"),
    "logits_scaling": (0, "logits_scaling '0'"),
    "partial_rotary_factor": (1e9, "0.001 and 1"),
    "final_logit_softcapping": (float("nan"), "'nan'"),
    "mm_vision_select_layer": (10**9, "whole number between -512 and 512"),
}
TOWER_CONFIG: dict[str, tuple[Any, str]] = {
    "hidden_size": (10**9, "1000000000"),
    "num_hidden_layers": (10**6, "num_hidden_layers"),
    "num_attention_heads": (5, "do not divide hidden_size"),
    "image_size": (10**9, "image_size '1000000000'"),
    "patch_size": (0, "patch_size '0'"),
    "patch_size beyond the image": (57, "0 patches"),
    "patch_size that is negative": (-14, "patch_size '-14'"),
    "image_size of tiny patches": (8192, "patches instead of"),
    "image_size of no number": (None, "invalid value"),
}
PREPROCESSOR: dict[str, tuple[Any, str]] = {
    "crop_size": ({"height": 10**9, "width": 10**9}, "crop_size.height"),
    "size": ({"shortest_edge": 10**9}, "size.shortest_edge"),
    "image_std": ([0.0, 1.0, 1.0], "image_std"),
    "image_mean": (["many"] * 3, "image_mean"),
    "resample": (77, "resample"),
}
WRONG = {
    f"{file}: {key}": (file, key.partition(" ")[0], value, named)
    for file, cases in (("config", CONFIG), ("tower", TOWER_CONFIG), ("preprocessor", PREPROCESSOR))
    for key, (value, named) in cases.items()
}


def refused_at_once(folder: Path | str) -> str:
    """The message; it is one sentence, it comes at once, and nothing large was allocated."""
    tracemalloc.start()
    began = time.thread_time()
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(str(folder))
    seconds = time.thread_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < AT_ONCE_S
    assert peak < MEMORY
    assert len(refused.value.message) < 600
    return refused.value.message


@pytest.mark.parametrize("what", WRONG)
def test_absurd_numbers_are_refused_at_once(what: str, tmp_path: Path) -> None:
    file, key, value, named = WRONG[what]
    folder = copy("llava-v1.5-tiny", tmp_path)
    path = {
        "config": folder / "config.json",
        "tower": tmp_path / TOWER / "config.json",
        "preprocessor": tmp_path / TOWER / "preprocessor_config.json",
    }[file]
    content = json.loads(path.read_text())
    others: dict[str, dict[str, Any]] = {
        "image_grid_pinpoints": {"image_aspect_ratio": "anyres"},
        "image_size": {"patch_size": 1},
    }
    path.write_text(json.dumps({**content, **others.get(key, {}), key: value}))
    message = refused_at_once(folder)
    assert named in message
    assert ".json" in message
    path.write_text(json.dumps(content))
    assert open_checkpoint(str(folder)).name == folder.name


@pytest.mark.parametrize("inside", ["text_config", "vision_config"])
def test_in_transformers_layout_a_message_names_the_part(inside: str, folder_of: Any, tmp_path: Path) -> None:
    content = json.loads((folder_of("llava-1.5-llama-hub") / "config.json").read_text())
    content[inside]["num_hidden_layers"] = 10**6
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert f"config.json in {tmp_path} has {inside}.num_hidden_layers '1000000'" in refused_at_once(tmp_path)


def test_an_adapters_rank_is_bounded(tmp_path: Path) -> None:
    copy("vicuna-v1.5-tiny", tmp_path)
    folder = copy("llava-v1.5-tiny-lora", tmp_path)
    edit(folder / "adapter_config.json", r=0)
    assert "r '0', which must be a whole number" in refusal(folder, model_base=str(tmp_path / "vicuna-v1.5-tiny"))


@pytest.mark.parametrize("depth", [33, 900, 100_000])
def test_a_deep_file_is_refused(depth: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    assert re.search("nested more than 32|not JSON", refused_at_once(tmp_path))


def test_a_number_of_many_digits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": ' + "9" * 1_000_000 + "}")
    assert "not JSON" in refused_at_once(tmp_path)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("config.json", FILE_BYTES[".json"]),
        ("generation_config.json", FILE_BYTES[".json"]),
        ("added_tokens.json", FILE_BYTES[".json"]),
        ("tokenizer.model", FILE_BYTES[".model"]),
        ("tokenizer.json", TOKENIZER_BYTES),
        ("model.safetensors.index.json", FILE_BYTES[".json"]),
    ],
)
def test_a_file_of_absurd_size_is_not_read(name: str, most: int, tmp_path: Path) -> None:
    folder = copy("llava-v1.5-tiny", tmp_path)
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    with (folder / name).open("ab") as file:
        file.truncate(1 << 30)
    message = refused_at_once(folder)
    assert f"{name} in {folder} takes 1,073,741,824 bytes" in message
    assert f"{most:,}" in message


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", "", 7, ["a"], None])
def test_an_index_names_files_beside_it_only(name: Any, tmp_path: Path) -> None:
    folder = copy("llava-v1.5-tiny", tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "names" in (message := refused_at_once(folder))
    assert "model.safetensors.index.json" in message


def header(length: int, **tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", length or len(text)) + text


F32 = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
LIES = {
    "a header beyond the file": header(10**9),
    "a header of no end": header(2**64 - 1),
    "data beyond the file": header(0, a=F32),
    "data of another size": header(0, a={**F32, "data_offsets": [0, 16]}) + bytes(16),
    "a product that overflows": header(0, a={**F32, "shape": [2**32, 2**32, 2**32]}) + bytes(16),
    "offsets that go back": header(0, a={**F32, "shape": [4], "data_offsets": [16, 0]}) + bytes(16),
    "no header": b"",
}


@pytest.mark.parametrize("what", LIES)
def test_the_header_of_weights_cannot_lie(what: str, tmp_path: Path) -> None:
    folder = copy("llava-v1.5-tiny", tmp_path)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for old in folder.glob("pytorch_model*"):
        old.unlink()
    (folder / "model.safetensors").write_bytes(LIES[what])
    tracemalloc.start()
    began = time.thread_time()
    assert "model.safetensors in" in refusal(folder)
    assert time.thread_time() - began < AT_ONCE_S
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("llava-v1.[56]*tiny")), ids=lambda folder: str(folder.name))
def test_good_checkpoints_pass(folder: Path) -> None:
    assert Llava.load(open_checkpoint(str(folder))).spec.path == folder
