"""Writes what `k8s/` has from the files at the top: `python -m deployments.tools.kubernetes`, in the repository.

Each folder of `FOLDERS` has `serve-changes.yaml`: what differs there from `serve_config.yaml`, with the reasons. From
both come the patches `serve-config.yaml`, which kustomize applies. `production.env` is copied, as the image names it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llava_serve.ray_application import NAMES

from .config import CONFIG, PROFILE, packaged

FOLDERS = ("base", "components/gpu")
"""In `k8s/`. The changes of each are made on top of those before it."""

CHANGES, PATCH = "serve-changes.yaml", "serve-config.yaml"

WHEEL = NAMES[0]
"""The application's package in the image, which installs the wheel."""

_HEADER = f"# Written by `python -m deployments.tools.kubernetes` from serve_config.yaml and {CHANGES}: change those.\n"
_PROFILE_HEADER = (
    "# Written by `python -m deployments.tools.kubernetes` from the production.env at the top: change that.\n"
)


class _Literal(str):
    """A text that YAML shows with its lines."""


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indents the items of a list."""
        super().increase_indent(flow, False)


_Dumper.add_representer(
    _Literal, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)


def main(argv: list[str] | None = None) -> int:
    """Writes the files. With --check it writes none, and the exit status is 1 if one is not as it would be written."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.kubernetes", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("k8s"))
    parser.add_argument("--check", action="store_true", help="write nothing; the status says whether files agree")
    options = parser.parse_args(argv)
    texts = generated(options.folder)
    old = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if options.check:
            print(f"{path} is not as serve_config.yaml and production.env have it.", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
            print(f"Wrote {path}.")
    return 1 if old and options.check else 0


def generated(folder: Path) -> dict[Path, str]:
    """The texts of all files that are written, by their paths; `folder` is `k8s/`."""
    texts = {folder / "base" / PROFILE: _PROFILE_HEADER + packaged(PROFILE, WHEEL)}
    config = yaml.safe_load(packaged(CONFIG, WHEEL))
    for name in FOLDERS:
        config = changed(config, yaml.safe_load((folder / name / CHANGES).read_text(encoding="utf-8")))
        patch = {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": {"name": "llava"},
            "spec": {"serveConfigV2": _Literal(_dumped(config))},
        }
        texts[folder / name / PATCH] = _HEADER + _dumped(patch)
    return texts


def changed(value: Any, changes: Any) -> Any:
    """A config with changes: None removes a key; of a list of named things, those that are named change.

    Raises:
        KeyError: a name that the list does not have.
    """
    if isinstance(changes, Mapping):
        merged = dict(value) if isinstance(value, Mapping) else {}
        for key, change in changes.items():
            if change is None:
                del merged[key]
            else:
                merged[key] = changed(merged.get(key), change)
        return merged
    if isinstance(changes, list) and isinstance(value, list):
        by_name = {item["name"]: item for item in value}
        for change in changes:
            by_name[change["name"]] = changed(by_name[change["name"]], change)
        return list(by_name.values())
    return changes


def _dumped(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


if __name__ == "__main__":
    sys.exit(main())
