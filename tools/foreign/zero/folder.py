"""The parameters, by name, in a folder of `DeepSpeedEngine.save_checkpoint` or `ds_to_universal`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tools.foreign.folder import Folder, FolderError, Parameter
from tools.foreign.zero.partitions import count, counts, of_files, of_parts, of_ranges, steps_of, whole
from tools.foreign.zero.pickles import Values, load
from wemmu.checkpoint.store import WEIGHTS

WHOLE_MODEL = "mp_rank_00_model_states.pt"  # ZeRO-1 and 2; under ZeRO-3 each rank has its own
MODEL, OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def is_folder(path: Path) -> bool:
    """Return whether this is a folder of a DeepSpeed run (with `latest`) or one of its checkpoints."""
    return any(path.glob("*_model_states.pt")) or (path / "latest").is_file()


def read_folder(path: Path) -> Folder:
    """Read what a folder holds, and where; values are read later, one parameter at a time.

    Raises:
        FolderError: naming the file that is missing, damaged, or not known to be inert, or what is not supported.
    """
    directory = _tagged(path)
    try:
        return _read(directory)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FolderError(f"{directory} is not laid out as DeepSpeed 0.19 lays its folders out: {error!r}") from error


def _read(directory: Path) -> Folder:
    _refuse_model_parallel(directory)
    sharded = not (directory / WHOLE_MODEL).is_file()
    models = _ranks(directory, MODEL) if sharded else [directory / WHOLE_MODEL]
    states = [load(file) for file in models]
    state = states[0]
    if not isinstance(state, dict) or not isinstance(state.get("param_shapes"), list):
        raise FolderError(f"{models[0]} was not saved under ZeRO: it has no param_shapes; valid choices: ZeRO-1, 2, 3")
    world = state["dp_world_size"]
    if sharded:
        _check_ranks(directory, MODEL, models, world)
    if (directory / "zero").is_dir():
        kind, steps = "universal", _universal_steps(directory / "zero", state)
        trained = of_files(state["param_shapes"], directory / "zero")
    else:
        prefix = "bf16_" if any(directory.glob(f"bf16_{OPTIMIZER.format('*')}")) else ""
        files = _ranks(directory, prefix + OPTIMIZER)
        _check_ranks(directory, prefix + OPTIMIZER, files, world)
        ranks = [(file, _optimizer(file, world)) for file in files]
        kind = f"ZeRO-{ranks[0][1]['zero_stage'].arguments[0]}"
        trained = (of_parts if sharded else of_ranges)(state["param_shapes"], ranks)
        steps = set().union(*(steps_of(file, held) for file, held in ranks))
    if len(steps) > 1:
        raise FolderError(f"{directory}: its parameters took different numbers of steps, {sorted(steps)}")
    frozen = _frozen_parts(models, states) if sharded else _frozen_whole(models[0], state, trained)
    made_by = f"DeepSpeed {state.get('ds_version')}, {kind}, {world} ranks"
    return Folder(made_by, steps.pop() if steps else state["global_steps"] - state["skipped_steps"], trained | frozen)


def _tagged(path: Path) -> Path:
    """The folder of one checkpoint; of a run's folder, the one that `latest` names."""
    if not (path / "latest").is_file():
        return path
    tag = (path / "latest").read_text(encoding="utf-8").strip()
    if tag in ("", ".", "..") or "/" in tag or not (path / tag).is_dir():
        raise FolderError(f"{path / 'latest'} names {tag!r}, which is not a folder beside it")
    return path / tag


def _refuse_model_parallel(directory: Path) -> None:
    for file in sorted(directory.glob("*.pt")):
        if re.search(r"mp_rank_(?!00_)\d+_", file.name) or file.name.startswith(("layer_", "expp_rank_")):
            raise FolderError(
                f"{file} is of tensor, pipeline or expert parallelism, which is not read; valid choices: a folder "
                "whose model was whole on every rank but for ZeRO"
            )


def _ranks(directory: Path, pattern: str) -> list[Path]:
    """The files that are there, in the order of their ranks."""
    number = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    found = {int(m[1]): file for file in directory.glob("*.pt") if (m := number.fullmatch(file.name))}
    if 0 not in found:
        raise FolderError(f"{directory / pattern.format(0)} is missing; the folder must hold the files of all ranks")
    return [found[rank] for rank in sorted(found)]


def _check_ranks(directory: Path, pattern: str, found: list[Path], world: int) -> None:
    expected = [directory / pattern.format(rank) for rank in range(world)]
    for file in expected:
        if file not in found:
            raise FolderError(f"{file} is missing; the folder must hold the files of all {world} ranks")
    if more := [file for file in found if file not in expected]:
        raise FolderError(f"{more[0]} is of another save than the other files, which are of {world} ranks")


def _optimizer(file: Path, world: int) -> dict[str, Any]:
    held = load(file)
    state = held.get("optimizer_state_dict") if isinstance(held, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise FolderError(f"{file} does not hold the state of a ZeRO optimizer")
    cut_into = state["partition_count"]
    if set(cut_into if isinstance(cut_into, list) else [cut_into]) != {world}:
        raise FolderError(f"{file} is cut into {cut_into} partitions, the model was saved by {world} ranks")
    return state


def _universal_steps(directory: Path, state: Mapping[str, Any]) -> set[int]:
    """ZeRO-1 and 2 leave the steps beside each parameter, ZeRO-3 in the optimizer's state."""
    files = [directory / name / "step.pt" for group in state["param_shapes"] for name in group]
    if present := [file for file in files if file.is_file()]:
        return {count(file, load(file)) for file in present}
    optimizer = directory / "optimizer_state.pt"
    held = load(optimizer)
    return steps_of(optimizer, held) if "fp32_flat_groups" in held else set()


def _frozen_whole(file: Path, state: Mapping[str, Any], trained: dict[str, Parameter]) -> dict[str, Parameter]:
    """What the model's own state has besides trained weights and buffers."""
    known = trained.keys() | set(state["buffer_names"]) | state["shared_params"].keys()
    return {
        name: whole(name, tensor.shape, False, {WEIGHTS: [Values.of(file, tensor)]})
        for name, tensor in state["module"].items()
        if name not in known and isinstance(tensor, Tensor)
    }


def _frozen_parts(files: list[Path], states: list[dict[str, Any]]) -> dict[str, Parameter]:
    """Each rank holds its part of every frozen parameter, unless they were left out when the folder was saved."""
    found = {}
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        parts = []
        for file, state, held in zip(files, states, counts(shape, len(files)), strict=True):
            if name not in state["frozen_param_fragments"]:
                raise FolderError(f"{file} lacks its part of the frozen {name}")
            parts.append(Values.of(file, state["frozen_param_fragments"][name]).part(0, held))
        found[name] = whole(name, shape, False, {WEIGHTS: parts})
    return found
