"""Finding and reading a checkpoint's small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
            return (_snapshot(folder) or folder).resolve()
    if not is_hub_id(name):
        raise CheckpointError(f"There is no folder {name!r} for the {what}.")
    return _from_hub(name, what, weights=weights).resolve()


def _snapshot(repository: Path) -> Path | None:
    """The snapshot of a `models--org--name` folder of the hub's cache: that of the branch main, or the only one."""
    snapshots = [] if (repository / "config.json").is_file() else sorted(repository.glob("snapshots/*"))
    main = repository / "refs" / "main"
    if main.is_file() and (named := repository / "snapshots" / main.read_text("utf-8").strip()) in snapshots:
        return named
    return snapshots[0] if len(snapshots) == 1 else None


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
    if first_file(folder, "config.json", "adapter_config.json") is None:
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
        CheckpointError: absent, cut off, or no JSON object.
    """
    path = folder / name
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing in {folder}; copy it there.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} in {folder} is damaged: it is not JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} in {folder} is damaged: it is no JSON object. Download it again.")
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
                    f"{stem}.index.json in {folder} is damaged: it has no weight_map. Download it again."
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
        if shards := _without_index(folder, stem):
            return shards
    return []


def _without_index(folder: Path, stem: str) -> list[Path]:
    """The shards of a set of weights whose index is not there; loading finds out whether a tensor is missing."""
    name, _, kind = stem.partition(".")
    shards = sorted(folder.glob(f"{name}-*-of-*.{kind}"))
    if shards:
        count = int(shards[0].stem.rpartition("-")[2])
        expected = [folder / f"{name}-{i:05}-of-{count:05}.{kind}" for i in range(1, count + 1)]
        if missing := [path.name for path in expected if path not in shards]:
            raise CheckpointError(f"{missing[0]} is missing in {folder}, and so is {stem}.index.json; copy both there.")
    return shards


def no_weights(folder: Path) -> str:
    """The start of a message on a folder without weights; it names what training leaves instead."""
    steps = next(iter(sorted(folder.glob("global_step*"))), None)
    hint = f" but DeepSpeed's {steps.name}, which its zero_to_fp32.py turns into them" if steps else ""
    return f"{folder} holds no weights{hint}"


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of some files that exists."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
