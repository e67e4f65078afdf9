"""Parts add up to the tensor they are of, in every layout, and nothing is saved that does not."""

import re
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from tests.parallel.ranks import on_ranks
from wemmu.checkpoint.sharded_tensor import ShardedTensor, TensorShard, WholePlanner, flat_parts, row_parts

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SIZED = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def whole(shape: tuple[int, ...]) -> Tensor:
    """A tensor in which every element has a value of its own."""
    return torch.arange(1.0, prod(shape) + 1).reshape(shape)


def assemble(shape: tuple[int, ...], parts: list[TensorShard]) -> Tensor:
    """The tensor of these parts; each element must be given once."""
    made, given_ = torch.zeros(shape), torch.zeros(shape)
    for place, part in ShardedTensor(shape, parts).places:
        made[place] = part
        given_[place] += 1
    assert bool((given_ == 1).all())
    return made


def cuts(length: int) -> st.SearchStrategy[list[int]]:
    """Where ranks begin and end when they share `length` things in their order, some perhaps getting none."""
    inner = st.lists(st.integers(0, length), max_size=5).map(sorted)
    return inner.map(lambda within: [0, *within, length])


@given(SHAPES, st.integers(0, 7), st.data())
def test_flat_ranges_of_all_ranks_are_the_tensor(shape: tuple[int, ...], padding: int, data: st.DataObject):
    flat = torch.cat([whole(shape).flatten(), torch.full((padding,), -1.0)])
    bounds = data.draw(cuts(len(flat)))
    parts = [flat_parts(shape, begin, flat[begin:end]) for begin, end in pairwise(bounds)]
    assert all(len(mine) <= max(1, 2 * len(shape) - 1) for mine in parts)
    assert torch.equal(assemble(shape, [part for mine in parts for part in mine]), whole(shape))


@given(SIZED, st.data())
def test_writing_into_parts_of_a_flat_range_writes_the_range(shape: tuple[int, ...], data: st.DataObject):
    begin = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(begin, prod(shape)))
    held = torch.zeros(end - begin)
    for place, part in ShardedTensor(shape, flat_parts(shape, begin, held)).places:
        part.copy_(whole(shape)[place])
    assert torch.equal(held, whole(shape).flatten()[begin:end])


@given(SIZED, st.booleans(), st.data())
def test_rows_of_tensor_slices_of_all_ranks_are_the_tensor(shape: tuple[int, ...], halves: bool, data: st.DataObject):
    """As tensor parallelism cuts it: a share of the dimension, or one of each of two halves, and padding behind."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape = (*shape[:dim], shape[dim] * (2 if halves else 1), *shape[dim + 1 :])
    # A 1x1 convolution may be kept without its last dimensions.
    ones = data.draw(st.integers(0, 2))
    canonical = whole((*shape, *(1,) * ones))
    half = shape[dim] // (2 if halves else 1)
    bounds, padding = data.draw(cuts(half)), data.draw(st.integers(0, 2))
    parts: list[TensorShard] = []
    for begin, end in pairwise(bounds):
        ranges = [(at + begin, at + end, i * (end - begin)) for i, at in enumerate(range(0, shape[dim], half))]
        taken = [whole(shape).narrow(dim, b, e - b) for b, e, _ in ranges]
        local = torch.cat([*taken, torch.full_like(whole(shape).narrow(dim, 0, min(padding, half)), -1)], dim)
        rows = data.draw(cuts(len(local)))
        for low, high in pairwise(rows):
            parts += row_parts(canonical.shape, local[low:high], low, dim, ranges)
    assert torch.equal(assemble(canonical.shape, parts), canonical)


@given(SIZED, st.data())
def test_rows_of_a_tensor_that_is_not_sliced_are_the_tensor(shape: tuple[int, ...], data: st.DataObject):
    bounds = data.draw(cuts(shape[0]))
    parts = [part for low, high in pairwise(bounds) for part in row_parts(shape, whole(shape)[low:high], low)]
    assert torch.equal(assemble(shape, parts), whole(shape))


def test_parts_are_views_of_live_memory_whatever_its_strides():
    live = torch.zeros(4, 6).t()
    for _, part in row_parts((6, 4), live[2:5], 2) + row_parts((6, 8), live, 0, 1, [(4, 8, 0)]):
        part += 1
    assert float(live.sum()) == 3 * 4 + 6 * 4


def test_a_part_beyond_the_tensor_is_refused():
    for shape, offset in (((3, 4), (2, 0)), ((3, 4), (-1, 0)), ((4,), (0, 0))):
        with pytest.raises(ValueError):
            ShardedTensor(shape, [(offset, torch.zeros(2, 4))])


def test_a_placed_tensor_has_a_shape_and_a_type_but_refuses_to_be_computed_with():
    placed = ShardedTensor((3, 4), [((1, 0), torch.zeros(2, 4, dtype=torch.bfloat16))])
    assert (placed.shape, placed.dtype) == ((3, 4), torch.bfloat16)
    with pytest.raises(TypeError, match="only its parts have data"):
        torch.add(placed, 1)


# What ranks hold of one tensor of 4 x 6.
X = whole((4, 6))


def halves(rank: int) -> list[TensorShard]:
    return [((2 * rank, 0), X[2 * rank : 2 * rank + 2])]


def replicas(rank: int) -> list[TensorShard]:
    return [((0, 0), X[:3]), ((3, 0), X[3:])]


def one_alone(rank: int) -> list[TensorShard]:
    return [] if rank else replicas(rank)


def nobody(rank: int) -> list[TensorShard]:
    return []


def a_hole(rank: int) -> list[TensorShard]:
    return [((2 * rank, 0), X[2 * rank : 2 * rank + 2, : 6 - rank])]


def other_sizes_at_one_offset(rank: int) -> list[TensorShard]:
    return [((0, 0), X[: 2 + rank])]


def an_overlap_that_makes_up_for_a_hole(rank: int) -> list[TensorShard]:
    return [((0, 0), X[:, :3])] if rank else [((0, 2), X[:, 2:5])]


WHOLE = [halves, replicas, one_alone]
FLAWED = {
    nobody: "x: no rank holds any of it",
    a_hole: "key:x invalid fill tensor-volume: 24 chunks-volume: 22",
    other_sizes_at_one_offset: "key:x invalid fill",
    an_overlap_that_makes_up_for_a_hole: "key:x has overlapping chunks",
}


class Outcome(NamedTuple):
    """On one rank: the bytes it wrote, whether it loaded what was saved, and why the save was refused, if it was."""

    written: int
    equal: bool
    refused: str


def save_and_load(folder: Path, rank: int, held: Callable[[int], list[TensorShard]]) -> Outcome:
    placed = ShardedTensor((4, 6), [(offset, part.clone()) for offset, part in held(rank)])
    try:
        dcp.save({"x": placed}, checkpoint_id=folder, planner=WholePlanner())
    except CheckpointException as error:
        return Outcome(0, False, "; ".join(str(cause) for cause, _ in error.failures.values()))
    for _, part in placed.parts:
        part.fill_(float("nan"))
    dcp.load({"x": placed}, checkpoint_id=folder)
    equal = all(torch.equal(part, mine) for (_, part), (_, mine) in zip(placed.parts, held(rank), strict=True))
    return Outcome(sum(file.stat().st_size for file in folder.glob(f"__{rank}_*")), equal, "")


def all_cases(rank: int, world: int, folder: Path) -> dict[str, Outcome]:
    return {held.__name__: save_and_load(folder / held.__name__, rank, held) for held in (*WHOLE, *FLAWED)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Of every case, in one launch: what each of two ranks saw."""
    ranks = on_ranks(2, all_cases, tmp_path_factory.mktemp("cases"))
    return {name: [cases[name] for cases in ranks] for name in ranks[0]}


@pytest.mark.parametrize("held", WHOLE)
def test_what_adds_up_to_a_tensor_is_saved_and_loaded_into_all_its_holders(outcomes, held):
    assert [(outcome.equal, outcome.refused) for outcome in outcomes[held.__name__]] == [(True, "")] * 2


def test_replicas_are_written_once(outcomes):
    once, twice = (sum(outcome.written for outcome in outcomes[case]) for case in ("one_alone", "replicas"))
    assert twice == once > 0


@pytest.mark.parametrize("held", FLAWED)
def test_what_does_not_add_up_to_a_tensor_is_refused_by_name_on_all_ranks(outcomes, held):
    for outcome in outcomes[held.__name__]:
        assert re.search(FLAWED[held], outcome.refused)


def test_a_hole_in_what_a_process_alone_holds_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CheckpointException, match="x: 4 of its 24 elements are held by no rank"):
        dcp.save({"x": ShardedTensor((4, 6), [((0, 0), X[:, :5])])}, checkpoint_id=tmp_path, planner=WholePlanner())
