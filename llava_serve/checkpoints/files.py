"""Finding and reading a checkpoint's small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_serve.errors import CheckpointError

BUILTIN = Path(__file__).parent.parent / "builtin"
_USEFUL = ("*.json", "*.model", "*.jinja", "*.safetensors", "*.bin")


def find_folder(name: str, what: str, *parents: Path) -> Path:
    """The folder that `name` means: `builtin`, a folder, or a hub id.

    Args:
        name: what someone wrote.
        what: it is for, in the message of an error.
        parents: where a relative name may begin, first match wins; none is the working directory alone.

    Raises:
        CheckpointError: there is none, and the hub neither has it in its cache nor can be reached.
    """
    if name == "builtin":
        return BUILTIN
    for parent in parents or (Path(),):
        folder = parent / Path(name).expanduser()
        if folder.is_dir():
            return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"There is no folder {name!r} for the {what}.")
    return _from_hub(name, what)


def _from_hub(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for cached_only in (True, False):
        try:
            return Path(snapshot_download(name, local_files_only=cached_only, allow_patterns=list(_USEFUL)))
        except LocalEntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise _absent(name, what) from error
    raise _absent(name, what)


def _absent(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The {what} {name!r} is neither a folder nor in the local hub cache, and the hub cannot give it. "
        "Download it first, or name a folder."
    )


def read_json(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object; an absent optional file is an empty one.

    Raises:
        CheckpointError: absent, cut off, or no JSON object.
    """
    path = folder / name
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing in {folder}; copy it there.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} in {folder} is damaged, it is not JSON; download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} in {folder} is damaged, it holds no object; download it again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files of a full set of weights, safetensors before `.bin`; empty if there is none.

    Raises:
        CheckpointError: an index names a file that is not there.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{stem}.index.json").is_file():
            index = read_json(folder, f"{stem}.index.json").get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError(
                    f"{stem}.index.json in {folder} is damaged, it has no weight_map; download it again."
                )
            paths = [folder / name for name in sorted(set(index.values()))]
            for path in paths:
                if not path.is_file():
                    raise CheckpointError(
                        f"{path.name} is missing in {folder}, though {stem}.index.json names it; copy it there."
                    )
            return paths
        if (folder / stem).is_file():
            return [folder / stem]
    return []


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of some files that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def checkpoint_name(folder: Path) -> str:
    """The original's name of a checkpoint: its folder's, or `parent_checkpoint-N` for one inside a training run."""
    return f"{folder.parent.name}_{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
