"""Compares a checkpoint with the config before a resume: what must be equal, what may differ, samples seen."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pydantic import ValidationError

from wemmu.checkpoint.collective import CheckpointError, all_ranks
from wemmu.checkpoint.manifest import Manifest, Origin
from wemmu.config.base import Config, leaves
from wemmu.config.schema import StageRun
from wemmu.config.upgrade import upgraded_settings
from wemmu.kernels import Kernels
from wemmu.published.identity import is_same, short

# Settings that determine the samples of a step.
_ORDER = re.compile(r"(seed|global_batch|validation):|mixture\.|records\.")
REORDER = "data.resume_reordered"


def settings(run: StageRun, records: Mapping[str, int], kernels: Kernels, device: torch.device) -> dict[str, Any]:
    """Return the settings of a stage's training: field -> value.

    records: number in each stream. kernels: the choice on `device`, as noise that another source draws is other noise,
    and each kernel rounds in its own way.
    """
    stage = run.stage.model_dump(
        mode="json", include={"global_batch", "steps", "trains", "objective", "optimizer", "mixture"}
    )
    shared = run.model_dump(mode="json", include={"recipe": True, "backbones": {"dtype"}, "memory": {"quantize"}})
    own = {"seed": run.seed, "validation": run.data.validation, **stage, "records": dict(records)}
    chosen = {field: value for field, value in asdict(kernels).items() if field != "refused"}
    own["kernels"] = {"device": device.type, **chosen}
    return dict(leaves(own | shared))


def check(directory: Path, manifest: Manifest, origin: Origin, run: StageRun) -> list[str]:
    """Return the settings that differ from the checkpoint's, each as "field: was -> is".

    All ranks call it and get the same answer.

    Raises:
        CheckpointError: if the checkpoint is of another stage, resolution, backbone or seed, or has more steps than the
            stage; or if other samples would come in the steps that remain, unless `data.resume_reordered` allows it.
    """

    def verdict(found: list[tuple[list[str], list[str]]]) -> list[str]:
        wrong = list(dict.fromkeys(reason for reasons, _ in found for reason in reasons))
        changes = list(dict.fromkeys(change for _, changes in found for change in changes))
        reordered = [change for change in changes if _ORDER.match(change)]
        if reordered and not run.data.resume_reordered:
            wrong.append(
                f"other samples would follow: {', '.join(reordered)}. Undo that, or set {REORDER}=true to accept it"
            )
        if wrong:
            raise CheckpointError(f"{directory} cannot be resumed from: {'; '.join(wrong)}")
        return changes

    mine = list(_unequal(manifest, origin, run)), list(_changes(manifest, origin, run))
    return all_ranks().together(f"{directory} was not loaded", lambda: mine, verdict)


def samples_seen(manifest: Manifest) -> int | None:
    """Return the number of samples that the checkpoint has seen; None if an earlier version did not record it."""
    if "global_batch" not in manifest.settings:
        return None
    return manifest.first_samples + (manifest.step - manifest.first_step) * int(manifest.settings["global_batch"])


def _unequal(manifest: Manifest, origin: Origin, run: StageRun) -> Iterator[str]:
    if manifest.stage != origin.stage:
        yield f"it is of the stage {manifest.stage}, this is {origin.stage}"
    # The resolutions of a stage share a folder.
    if manifest.resolution not in (origin.resolution, *run.stage.resolutions):
        yield f"it was trained at {manifest.resolution} px, this stage is at {origin.resolution} px"
    for part, recorded in manifest.frozen.items():
        here = origin.frozen.get(part)
        if here is None:
            yield f"{part} was frozen in it and is trained here"
        elif not is_same(recorded, here):
            yield f"it was trained with another {part} (SHA-256 {short(recorded)}, here {short(here)})"
    if manifest.step > run.stage.steps:
        yield f"it has {manifest.step} steps, and the stage ends after {run.stage.steps}; set stage.steps to more"


def _changes(manifest: Manifest, origin: Origin, run: StageRun) -> Iterator[str]:
    # The first checkpoints of this format record the seed alone.
    was = upgraded_settings(manifest.settings, origin.settings) or {"seed": manifest.seed}
    if not any(_group(field) == "memory" for field in was):
        was["memory.quantize"] = {}
    if any(_group(field) == "kernels" for field in was):
        was.setdefault("kernels.channels_last", False)
    was = with_defaults(with_defaults(was, "recipe", run.recipe), "objective", run.stage.objective)
    recorded = {_group(field) for field in was}
    # Until it was recorded, all noise came from the host; on a GPU it would be other noise unsaid.
    was.setdefault("kernels.noise", "host")
    for field in dict.fromkeys((*was, *(origin.settings if manifest.settings else ()))):
        # Each resolution reads streams of its own.
        if field.startswith("records.") and manifest.resolution != origin.resolution:
            continue
        # An earlier version recorded less.
        if (field in was or _group(field) in recorded) and was.get(field) != origin.settings.get(field):
            yield f"{field}: {was.get(field, 'absent')} -> {origin.settings.get(field, 'absent')}"


def with_defaults(was: Mapping[str, Any], group: str, today: Config) -> dict[str, Any]:
    """Return recorded settings with a group as today's config reads it: fields that came later have their defaults."""
    mine = {field: value for field, value in was.items() if _group(field) == group}
    tree = OmegaConf.create()
    for field, value in mine.items():
        OmegaConf.update(tree, field, value)
    plain: Any = OmegaConf.to_container(tree)
    try:
        read = type(today).model_validate(plain.get(group, {}))
    except ValidationError:
        # Of another kind, or no longer valid: the fields themselves say what differs.
        return dict(was)
    rest = {field: value for field, value in was.items() if field not in mine}
    return rest | (dict(leaves(read.model_dump(mode="json"), group)) if mine else {})


def _group(field: str) -> str:
    return field.partition(".")[0]
