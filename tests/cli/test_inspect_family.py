"""What `inspect` says of the newer kinds, and `ask --json` beside its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava_serve.cli import main

LINES = {
    "onevision": (
        "qwen2: 2 layers of 64, 4 heads (2 for keys and values)",
        "siglip_vision_model: 3 layers of 32, 42 px in patches of 14",
        "features        of layer -1\n",
        "of several in a request each padded to a square, then 42 x 42 (bicubic), 10 per picture",
        "at most 16 tiles beside the overview; images.max_tiles sets fewer",
    ),
    "vip-llava-hub": (
        "of the layers -2, 1, 3, joined, without the class token",
        "mlp2x_gelu (96 to 64, after a norm)",
        "the centre, 42 x 42",
    ),
    "joycaption": ("squashed to 42 x 42", "9 per picture"),
}


@pytest.mark.parametrize("kind", LINES)
def test_inspect(kind: str, folder_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder_of(kind))]) == 0
    printed = capsys.readouterr().out
    for line in LINES[kind]:
        assert line in printed


@pytest.mark.parametrize(("kind", "noted"), [("vip-llava-hub", 1), ("llava-gemma", 2), ("joycaption", 0)])
def test_ask_has_the_template_and_the_notes_of_inspect(
    kind: str, noted: int, folder_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folder_of(kind))
    assert main(["inspect", "--json", folder]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert main(["ask", "--json", "--model", folder, "--device", "cpu", "--max-new-tokens", "1", "What is it?"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert answered["notes"] == inspected.get("note", [])
    assert len(answered["notes"]) == noted
    assert [answered["template"]] == inspected["template"]
