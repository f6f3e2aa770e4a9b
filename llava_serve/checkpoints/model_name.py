"""The one name of a model, derived from `--model`: for `/v1/models`, `inspect` and the choice of a template."""

from __future__ import annotations

import os
import re
from pathlib import Path

_IN_HUB_CACHE = re.compile(r"models--(?P<organization>[^/]+?)--(?P<name>[^/]+)(/snapshots/[^/]+)?$")
_TRAINING_STEP = re.compile(r"checkpoint-\d+")


def is_hub_id(model: str) -> bool:
    """Whether a name that is no folder can be a hub id: `organization/name`."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def model_name(model: str) -> str:
    """The name in `/v1/models`.

    Args:
        model: `builtin`, a folder, or a hub id, as `open_checkpoint` takes it.

    Returns:
        A hub id unchanged, also for its folder in the hub's cache; `run/checkpoint-N` for a folder of a training run;
        the last segment of any other folder. Links are not followed: the name is the one that the user wrote.
    """
    folder = Path(model).expanduser()
    if model == "builtin" or (is_hub_id(model) and not folder.is_dir()):
        return model
    path = Path(os.path.abspath(folder))
    if cached := _IN_HUB_CACHE.search(path.as_posix()):
        return f"{cached['organization']}/{cached['name']}"
    return f"{path.parent.name}/{path.name}" if _TRAINING_STEP.fullmatch(path.name) else path.name


def short_name(name: str) -> str:
    """The last segment of a model's name. Requests may use it, too."""
    return name.rsplit("/", 1)[-1]


def name_for_templates(name: str) -> str:
    """The part of a model's name that decides its template: the last segment, or the run's of a `run/checkpoint-N`."""
    parent, _, last = name.rpartition("/")
    return parent if parent and _TRAINING_STEP.fullmatch(last) else last
