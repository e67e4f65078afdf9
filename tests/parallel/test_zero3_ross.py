"""The engine zero3 trains a VLM that answers and reconstructs as the single one does."""

import pytest

from tests.parallel.cases import Outcome, RossCase, merged, single
from tests.parallel.test_zero3 import check, on
from wemmu.config.schema import Backbones

CASES = {
    "align": RossCase(trains=("projector", "head")),
    "tune": RossCase(tasks=RossCase.tasks * 3),
    "regression": RossCase(head={"kind": "mlp"}),
    # Steps of words alone, whose head and projector have no gradient on any rank, between those of images.
    "words and images": RossCase(tasks=RossCase.tasks * 3, images=(1, 0, 2)),
}


@pytest.mark.slow
def test_losses_gradients_and_weights_are_those_of_the_single_engine(backbones: Backbones) -> None:
    theirs: dict[str, Outcome] = {name: merged([single(case, backbones)]) for name, case in CASES.items()}
    ours = on(2, backbones, CASES)
    for name in CASES:
        check(ours[name], theirs[name])
