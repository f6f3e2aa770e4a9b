"""What lies beside or inside a checkpoint: where its vision tower is, and what is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_serve.checkpoints.families import is_llava_next
from llava_serve.checkpoints.files import weight_files
from llava_serve.checkpoints.folders import find_folder
from llava_serve.checkpoints.spec import Adapter
from llava_serve.checkpoints.weight_mapping import LAYOUTS, our_name
from llava_serve.checkpoints.weight_names import weight_names
from llava_serve.config import ModelOptions
from llava_serve.errors import CheckpointError

_KNOWN_TOWERS = Path(__file__).parent / "known_towers"
"""The two small files of the common towers: a checkpoint that holds its tower's weights needs no other folder."""


def find_tower(
    folder: Path, base: Path | None, config: dict[str, Any], options: ModelOptions, *, weights: bool
) -> tuple[Path, bool, tuple[str, ...]]:
    """The vision tower of a checkpoint in the original's layout.

    Args:
        folder, config: of the checkpoint.
        base: of an adapter.
        options: what overrides its config.json.
        weights: as `open_checkpoint` has it.

    Returns:
        The folder with its description; whether its weights are those in the checkpoint; and notes on the choice.

    Raises:
        CheckpointError: there is no such folder.
    """
    names = weight_names(base or folder) if weights else ()
    ours = (our_name(name, LAYOUTS["original"]) or "" for name in names)
    count = sum(name.startswith("vision_tower.") for name in ours)
    held = count if count or (names and base is None) else None  # None is unknown: an adapter may hold one, too
    trained, chosen = _was_trained(config), options.vision_tower_weights
    belongs = trained or is_llava_next(config)  # which saves its tower, and loads what is there
    if held == 0 and chosen == "checkpoint":
        raise CheckpointError(
            f"{folder} holds no vision tower; leave vision_tower_weights (--vision-tower-weights) out."
        )
    inside = held != 0 and (belongs if chosen is None else chosen == "checkpoint")
    needs_weights = weights and not (inside and held)
    tower = _folder(folder, config, options.vision_tower, weights=needs_weights, may_be_known=inside)
    notes: tuple[str, ...] = ()
    if held and not inside:
        why = "vision_tower_weights is folder" if chosen else "config.json does not say that it was trained"
        notes = (
            f"The checkpoint holds a vision tower ({held} tensors), which is not used: {why}. The weights are those in "
            f"{tower}; --vision-tower-weights checkpoint takes the checkpoint's.",
        )
    elif held and not trained and chosen is None:
        notes = (
            f"The vision tower is the checkpoint's ({held} tensors), as LLaVA-NeXT has it, though config.json does not "
            f"say that it was trained; --vision-tower-weights folder takes the weights in {tower}.",
        )
    elif held == 0 and trained and chosen is None:
        notes = (f"config.json says that the vision tower was trained, but the checkpoint holds none: it is {tower}.",)
    return tower, inside, notes


def _was_trained(config: dict[str, Any]) -> bool:
    """The original's rule, and LLaVA-NeXT's: the weights of a tower that was trained are in the checkpoint."""
    parts = str(config.get("mm_tunable_parts") or "").split(",")
    return bool(config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in (part.strip() for part in parts)


def _folder(folder: Path, config: dict[str, Any], override: str | None, *, weights: bool, may_be_known: bool) -> Path:
    name = override or str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    if not name:
        raise CheckpointError("config.json lacks mm_vision_tower; name a tower with vision_tower (--vision-tower).")
    parents = (Path(),) if override else (folder, Path())
    known = _KNOWN_TOWERS / name.replace("/", "--")
    if may_be_known and not weights and known.is_dir() and not any((parent / name).is_dir() for parent in parents):
        return known
    try:
        return find_folder(name, "vision tower", *parents, weights=weights)
    except CheckpointError as error:
        if override:
            raise
        raise CheckpointError(f"{error.message} {_advice(folder, name)}") from error


def _advice(folder: Path, name: str) -> str:
    """What to do about a tower that is not here: a folder of its last name may lie beside or inside the checkpoint."""
    last = Path(name).name
    near = (parent / last for parent in (folder, folder.parent, folder.parent.parent))
    found = next((path for path in near if last and path.is_dir() and path != folder), None)
    if found is not None:
        return f"config.json names it (mm_vision_tower); one of that name lies here: --vision-tower {found}."
    return "config.json names it (mm_vision_tower); name another folder with --vision-tower."


def unused_shards(folder: Path, weights: bool) -> str | None:
    """The note on shards that lie beside one file with all weights."""
    files = weight_files(folder) if weights else []
    if len(files) != 1 or not (index := folder / f"{files[0].name}.index.json").is_file():
        return None
    return (
        f"Both {files[0].name} and {index.name} lie in the folder. The one file is read, as transformers does; the "
        "shards that the other names are not used."
    )


def unused_adapter(folder: Path, adapter: Adapter | None) -> str | None:
    """The note on an adapter that lies beside full weights."""
    if adapter is not None or not (folder / "adapter_config.json").is_file():
        return None
    return (
        "An adapter (adapter_config.json) lies beside full weights and is not used. Move it to a folder of its own, "
        "and name this one as its base."
    )
