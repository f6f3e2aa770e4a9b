"""The folders of the tests' files."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
BUILTIN = ROOT / "llava_serve" / "builtin"
CONFIG = ROOT / "serve_config.yaml"
