"""Finding a checkpoint's folder: it ships, it is named, or a hub has it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from llava_serve.checkpoints.files import first_file, gigabytes, weight_files
from llava_serve.checkpoints.model_name import is_hub_id
from llava_serve.errors import CheckpointError

_log = logging.getLogger(__name__)

BUILTIN = Path(__file__).parent.parent / "builtin"
_DESCRIPTION = ("*.json", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin")
_SAFETENSORS = {"model.safetensors", "model.safetensors.index.json"}
_SECOND_COPY = "pytorch_model*.bin"
"""Where a repository has the same weights as safetensors, these are neither read (`weight_files`) nor downloaded."""


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
    if Path(name).expanduser().is_file():
        raise CheckpointError(f"{name} is a file; the {what} is a folder, or a hub id.")
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
    """The snapshot of a repository. What the local cache lacks of it is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*_DESCRIPTION, *(_WEIGHTS if weights else ())]
    partial: Path | None = None
    try:
        there = {"local_files_only": True, "allow_patterns": wanted, "ignore_patterns": _SECOND_COPY}
        folder = Path(snapshot_download(name, **there))
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
        files = snapshot_download(name, revision=revision, allow_patterns=wanted, dry_run=True)
        if _SAFETENSORS & {file.filename for file in files}:
            files = [file for file in files if not Path(file.filename).match(_SECOND_COPY)]
        _check_disk(name, what, [file.file_size or 0 for file in files if file.will_download])
        chosen = [file.filename for file in files]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=chosen))
    except (HfHubHTTPError, OSError) as error:
        raise _absent(name, what, partial) from error
    if _lacks(folder, weights=weights):
        raise _absent(name, what, folder)
    return folder


def _check_disk(name: str, what: str, sizes: Sequence[int]) -> None:
    """Refuses a download that the disk cannot hold, before it fills the disk."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not sizes:
        return
    cache = Path(HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if sum(sizes) > free:
        raise CheckpointError(
            f"The {what} {name!r} needs {gigabytes(sum(sizes))} of disk, and {cache} has {gigabytes(free)} left. Free "
            "some, or let HF_HOME name a folder on a larger disk."
        )
    _log.info("Downloading %s: %s in %d files, to %s.", name, gigabytes(sum(sizes)), len(sizes), cache)


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
