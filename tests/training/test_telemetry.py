"""A line of the record says of the samples between two lines what they were."""

import time

import pytest
import torch

from tests.parallel.ranks import on_ranks
from wemmu.training.telemetry import Window
from wemmu.types import Losses


def losses(values: list[float], task: str, bins: list[bool]) -> Losses:
    tags = {f"loss/{task}": torch.ones(len(values), dtype=torch.bool), "loss/t_0.00_0.25": torch.tensor(bins)}
    return Losses(torch.tensor(values), tags)


def test_means_are_over_samples_and_not_over_micro_batches():
    window = Window(("t2i", "edit", "multi_edit"))
    window.add(losses([1.0, 2.0, 3.0], "t2i", [True, False, True]))
    window.add(losses([10.0], "edit", [False]))
    window.counts.update({"t2i": 3, "edit": 1, "tokens": 400, "padding": 100, "flops": 8000})
    window.waited = 0.02
    time.sleep(0.1)
    values = window.close()
    assert values["loss"] == pytest.approx(4.0)
    assert values["loss/t2i"] == pytest.approx(2.0)
    assert values["loss/edit"] == pytest.approx(10.0)
    assert values["loss/t_0.00_0.25"] == pytest.approx(2.0)
    assert {k: v for k, v in values.items() if k.startswith("share/")} == {
        "share/t2i": 0.75,
        "share/edit": 0.25,
        "share/multi_edit": 0.0,
    }
    elapsed = 4 / values["samples_per_s"]
    assert 0.1 <= elapsed < 5
    assert values["tokens_per_s"] == pytest.approx(400 / elapsed)
    assert values["flops_per_s"] == pytest.approx(8000 / elapsed)
    assert values["padding_share"] == 0.2
    assert values["data_wait_share"] == pytest.approx(0.02 / elapsed)
    assert 0.05 < values["memory/host_gb"] < 1000


def close_on(rank: int, world: int) -> dict[str, float]:
    window = Window(("t2i",))
    window.add(losses([1.0, 2.0] if rank == 0 else [6.0], "t2i", [True] * (2 - rank)))
    window.counts.update({"t2i": 2 - rank, "tokens": 100 * (rank + 1)})
    window.waited = 0.01 * (1 + rank)
    return window.close()


def test_ranks_add_up_what_they_did_and_the_slowest_reader_counts():
    ours, theirs = on_ranks(2, close_on)
    assert ours["loss"] == theirs["loss"] == pytest.approx(3.0)
    elapsed = 3 / ours["samples_per_s"]
    assert ours["tokens_per_s"] == pytest.approx(300 / elapsed)
    assert ours["data_wait_share"] == pytest.approx(0.02 / elapsed)
    assert ours["share/t2i"] == 1.0


def test_what_was_not_seen_is_left_out_and_a_loss_that_is_not_finite_stays_with_its_samples():
    for bins in ([False, False], [True, False]):
        window = Window(("t2i",))
        window.add(losses([1.0, float("nan")], "t2i", bins))
        values = window.close()
        assert values.get("loss/t_0.00_0.25") == (1.0 if any(bins) else None)
        assert not {"tokens_per_s", "flops_per_s", "mfu"} & values.keys()
        assert values["loss"] != values["loss"]
