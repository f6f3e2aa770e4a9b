"""Finding and reading a checkpoint's small files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.bounds import check_size, check_values
from llava_serve.checkpoints.model_name import is_hub_id
from llava_serve.errors import CheckpointError

BUILTIN = Path(__file__).parent.parent / "builtin"
_DESCRIPTION = ("*.json", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin")


def find_folder(name: str, what: str, *parents: Path, weights: bool = True) -> Path:
    """The folder that `name` means: `builtin`, a folder, or a hub id.

    Args:
        name: as the user wrote it.
        what: it is for, in the message of an error.
        parents: folders that a relative name is looked up in, first match wins; none is the working directory.
        weights: download the weights, too, if the folder comes from the hub.

    Raises:
        CheckpointError: there is none, the hub's cache does not hold all of it, and the hub does not give it.
    """
    if name == "builtin":
        return BUILTIN
    for parent in parents or (Path(),):
        folder = parent / Path(name).expanduser()
        if folder.is_dir():
            return folder.resolve()
    if not is_hub_id(name):
        raise CheckpointError(f"There is no folder {name!r} for the {what}.")
    return _from_hub(name, what, weights=weights).resolve()


def _from_hub(name: str, what: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*_DESCRIPTION, *(_WEIGHTS if weights else ())]
    partial: Path | None = None
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
        if not _lacks(folder, weights=weights):
            return folder
        partial = folder
    except LocalEntryNotFoundError as error:
        begun = getattr(error, "snapshot_path", None)
        partial = None if begun is None else Path(begun)
    except (HFValidationError, OSError) as error:
        raise _absent(name, what, None) from error
    # A partial revision is completed, so that all tiers serve the same one.
    revision = None if partial is None else partial.name
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        raise _absent(name, what, partial) from error
    if _lacks(folder, weights=weights):
        raise _absent(name, what, folder)
    return folder


def _lacks(folder: Path, *, weights: bool) -> bool:
    """Whether a snapshot lacks a necessary file. The hub's client finds every missing file, but only if it keeps the
    listing of the repository, which older ones did not."""
    if not (folder / "config.json").is_file():
        return True
    if not weights:
        return False
    try:
        return not weight_files(folder) and first_file(folder, "adapter_config.json", "mm_projector.bin") is None
    except CheckpointError:
        return True


def _absent(name: str, what: str, partial: Path | None) -> CheckpointError:
    if partial is not None:
        return CheckpointError(
            f"The {what} {name!r} is only partly in the local hub cache ({partial}), and the rest cannot be "
            "downloaded. Download it again, or name a folder."
        )
    return CheckpointError(
        f"The {what} {name!r} is neither a folder nor in the local hub cache, and it cannot be downloaded. "
        "Download it first, or name a folder."
    )


def read_json(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object; an absent optional file is an empty one.

    Raises:
        CheckpointError: absent, cut off, no JSON object, or beyond the bounds of `llava_serve.checkpoints.bounds`.
    """
    path = folder / name
    if optional and not path.is_file():
        return {}
    check_size(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing in {folder}; copy it there.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} in {folder} is damaged: it is not JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} in {folder} is damaged: it is no JSON object. Download it again.")
    check_values(name, folder, value)
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files of a full set of weights, safetensors before `.bin`; empty if there is none.

    Raises:
        CheckpointError: an index names a file that is not there, or not of this folder.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{stem}.index.json").is_file():
            index = read_json(folder, f"{stem}.index.json").get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError(
                    f"{stem}.index.json in {folder} is damaged: it has no weight_map. Download it again."
                )
            _check_names(index.values(), f"{stem}.index.json", folder)
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


def _check_names(names: Iterable[Any], index: str, folder: Path) -> None:
    """Refuses what is not the plain name of a file: an index names those beside it."""
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise CheckpointError(
                f"{index} in {folder} names {str(name)[:100]!r}, which is no file beside it; download it again."
            )


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of some files that exists."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
