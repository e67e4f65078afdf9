"""Where the ranks' parts of a parameter are in ZeRO's flat float32 masters and moments.

ZeRO-1 and 2 lay the parameters of an optimizer's group one after the other and cut the whole into as many equal ranges
as there are ranks; each rank notes which range of which parameter it holds. ZeRO-3 cuts each parameter into as many
equal parts, the last one padded, and a rank lays its parts one after the other, in the order of `param_shapes`.
DeepSpeed's universal folders hold each parameter whole, in a file of its own.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.export.stored import Stored
from tools.foreign.folder import FolderError, Parameter
from tools.foreign.zero.pickles import Values, load
from wemmu.checkpoint.store import MOMENTS, WEIGHTS

# The optimizer's groups, each with its parameters' shapes in their order.
Shapes = Sequence[Mapping[str, Sequence[int]]]


def whole(name: str, shape: Sequence[int], trained: bool, parts: Mapping[str, Sequence[Values]]) -> Parameter:
    """Return the parameter of these values, in their order; raise FolderError unless they add up to the shape."""
    for which, held in parts.items():
        if (count := sum(part.count for part in held)) != prod(shape):
            where = f"; see {held[0].file}" if held else ""
            raise FolderError(f"{which} of {name}: the ranks hold {count} values, its shape is {list(shape)}{where}")
    return Parameter(
        trained,
        {which: Stored(tuple(shape), held[0].dtype, partial(_read, shape, held)) for which, held in parts.items()},
    )


def _read(shape: Sequence[int], parts: Sequence[Values]) -> Tensor:
    flat = torch.empty(prod(shape))
    begin = 0
    for part in parts:
        part.read_into(flat[begin : begin + part.count])
        begin += part.count
    return flat.view(tuple(shape))


def of_ranges(shapes: Shapes, ranks: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Parameter]:
    """Return the trained parameters of ZeRO-1 or 2; ranks: file and optimizer state of each rank, in order."""
    found = {}
    for number, group in enumerate(shapes):
        flats = [
            (file, state["param_slice_mappings"][number], _flats(file, _groups(file, state), number, state))
            for file, state in ranks
        ]
        for name, shape in group.items():
            parts: dict[str, list[Values]] = {which: [] for which in flats[0][2]}
            for _, ranges, flat in flats:
                if name in ranges:
                    for which, values in flat.items():
                        parts[which].append(values.part(ranges[name].start, ranges[name].numel))
            found[name] = whole(name, shape, True, parts)
    return found


def of_parts(shapes: Shapes, ranks: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Parameter]:
    """Return the trained parameters of ZeRO-3, as `of_ranges`."""
    found = {}
    for number, group in enumerate(shapes):
        flats = [_flats(file, state["fp32_flat_groups"], number, state) for file, state in ranks]
        begin = 0
        for name, shape in group.items():
            parts = {
                which: [
                    flat[which].part(begin, count) for flat, count in zip(flats, counts(shape, len(ranks)), strict=True)
                ]
                for which in flats[0]
            }
            found[name] = whole(name, shape, True, parts)
            begin += -(-prod(shape) // len(ranks))
        for (file, _), flat in zip(ranks, flats, strict=True):
            if flat[WEIGHTS].count != begin:
                raise FolderError(f"{file}: group {number} holds {flat[WEIGHTS].count} values, its shapes say {begin}")
    return found


def of_files(shapes: Shapes, directory: Path) -> dict[str, Parameter]:
    """Return the trained parameters of a universal folder, as `of_ranges`."""
    found = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        if "/" in name:
            raise FolderError(f"{directory}: {name!r} is not the name of a parameter")
        files = {WEIGHTS: directory / name / "fp32.pt", **{m: directory / name / f"{m}.pt" for m in MOMENTS}}
        present = {which: file for which, file in files.items() if which == WEIGHTS or file.is_file()}
        parts = {}
        for which, file in present.items():
            held = load(file)
            parts[which] = [Values.of(file, held.get("param") if isinstance(held, dict) else held)]
        found[name] = whole(name, shape, True, parts)
    return found


def counts(shape: Sequence[int], world: int) -> list[int]:
    """Return the number of elements of a parameter on each rank under ZeRO-3, without padding."""
    size = -(-prod(shape) // world)
    return [max(0, min(size, prod(shape) - rank * size)) for rank in range(world)]


def steps_of(file: Path, state: Mapping[str, Any]) -> set[int]:
    """Return the steps that a rank's optimizer counted; empty if it did not count."""
    adam = _adam(file, state)
    counted = [*adam["state"].values(), *adam["param_groups"]]
    return {count(file, entry["step"]) for entry in counted if "step" in entry}


def count(file: Path, step: Any) -> int:
    """Return a number of steps, which torch's optimizers store as a tensor."""
    if not isinstance(step, Tensor):
        return int(step)
    read = torch.empty(1)
    Values.of(file, step).read_into(read)
    return int(read)


def _groups(file: Path, state: Mapping[str, Any]) -> Sequence[Tensor]:
    if not isinstance(state.get("base_optimizer_state"), dict):
        raise FolderError(f"{file} was saved with elastic_checkpoint, which is not read; make a universal folder of it")
    return state["single_partition_of_fp32_groups"]


def _adam(file: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    return state["optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"]


def _flats(file: Path, masters: Sequence[Tensor], number: int, state: Mapping[str, Any]) -> dict[str, Values]:
    """The flat master of a group and, if Adam made them, its moments."""
    kept = _adam(file, state)["state"].get(number, {})
    moments = {which: Values.of(file, kept[which]) for which in MOMENTS if which in kept}
    return {WEIGHTS: Values.of(file, masters[number]), **moments}
