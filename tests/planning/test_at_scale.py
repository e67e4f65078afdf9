"""The plan agrees with what the engines do in worlds of 8, 64 and 1024 ranks, played one rank at a time.

Widths, resolutions, batches and degrees are the paper's; there are fewer layers. At the full sizes the same is run by
`python -m benchmarks.at_scale`, see docs/parallel.md.
"""

import json
from typing import Any

import pytest

from benchmarks.at_scale import Case, compare, planned, run_all
from tests.planning.worlds import PAPER, write_published
from wemmu.config.schema import Backbones
from wemmu.planning.schedule import idle_share, order

LAYERS = {
    "vlm": {"num_hidden_layers": 4},
    "sana/transformer": {"num_layers": 6},
}
# Stage, ranks, tp, pp. ZeRO-3 on 1024 ranks takes too long: DeepSpeed makes a list over them at every gathering.
# The DiT learns in stage 2; in stage 1 with many ranks what only passes through the bridge weighs most.
WORLDS = [("stage2", 8, 1, 1), ("stage2", 64, 2, 2), ("stage1", 1024, 4, 1)]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    root = tmp_path_factory.mktemp("shallow")
    backbones = write_published(root)
    for folder, changes in LAYERS.items():
        file = root / folder / "config.json"
        config = json.loads(file.read_text()) | changes
        if "vision_config" in config:
            config["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}
        file.write_text(json.dumps(config))
    return backbones


@pytest.fixture(scope="module")
def played(shallow: Backbones) -> list[dict[str, Any]]:
    cases = [Case(PAPER, *world, stage, place) for stage, *world in WORLDS for place in range(world[2])]
    return run_all(cases, shallow, jobs=2, out=None)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: "-".join(map(str, world)))
def test_memory_traffic_and_idle_time_are_as_planned(
    played: list[dict[str, Any]],
    shallow: Backbones,
    world: tuple[str, int, int, int],
):
    stage, *split = world
    ranks = [rank for rank in played if (rank["stage"], rank["world"], rank["tp"], rank["pp"]) == world]
    assert len(ranks) == world[3]
    rows = compare(ranks, planned(Case(PAPER, *split, stage, 0), shallow))
    peak = rows[0].measured
    wrong = [
        row
        for row in rows
        # Parts of the memory are held against the whole.
        if (abs(row.planned - row.measured) / peak if row.name.startswith("-") else abs(row.error)) > 0.1
    ]
    assert not wrong, "\n".join(f"{row.name}: {row.measured:.4g} measured, {row.planned:.4g} planned" for row in rows)


def test_the_idle_share_of_equal_stages_is_the_published_one():
    for stages, micro_batches in ((1, 4), (2, 4), (4, 8), (4, 32)):
        share = idle_share([list(order(i, stages, micro_batches, (1.0, 2.0))) for i in range(stages)])
        assert share == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_a_stage_that_is_slower_makes_the_others_wait():
    # All is over when the slow stage is: it works without a pause but for the other's first and last slots.
    slots = [list(order(i, 2, 4, flops)) for i, flops in enumerate([(1.0, 2.0), (2.0, 4.0)])]
    assert idle_share(slots) == pytest.approx(1 - 4 * 9 / (2 * (1 + 4 * 6 + 2)))


def test_every_micro_batch_goes_forward_and_back_once():
    for place in range(3):
        slots = [slot[:2] for slot in order(place, 3, 5)]
        assert sorted(slots) == [(backward, i) for backward in (False, True) for i in range(5)]
        assert slots[: 3 - place] == [(False, i) for i in range(3 - place)]
