"""How the engine zero3 begins: without the whole model in memory, without a word, and without a launcher."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.models.world import make_batch
from tests.parallel.cases import Case
from tests.parallel.ranks import on_ranks
from wemmu.checkpoint.sharded_tensor import ShardedTensor
from wemmu.config.schema import Backbones
from wemmu.parallel import zero3
from wemmu.parallel.topology import Topology
from wemmu.parallel.zero3 import Zero3Engine
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.loss import FlowMatchingLoss

CPU = torch.device("cpu")


def alive() -> int:
    """Bytes of all tensors there are; memory that several share counts once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not isinstance(thing, ShardedTensor | DTensor) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def settled() -> int:
    """`alive`, once whatever other threads of the libraries still hold for a moment is gone."""
    found = [alive()]
    for _ in range(5):
        time.sleep(0.2)
        found.append(alive())
    return min(found)


def builds(rank: int, world: int, backbones: Backbones, by_blocks: bool) -> dict[str, int]:
    """Bytes at most and at the end, beside those of the parts; and the answer of the model."""
    gc.freeze()
    before, sizes, largest = alive(), [0], [0]

    def place(prefix: str, block: nn.Module) -> None:
        sizes.append(alive() - before)
        largest.append(sum(p.nbytes for p in block.parameters()))
        zero3.shard(block, CPU)

    model, _ = build_model(backbones, Case().run.recipe.bridge, 0, *([place] if by_blocks else []))
    sizes.append(alive() - before)
    for part in (model.bridge, model.dit):
        zero3.shard(part, CPU)
    return {
        "peak": max(sizes),
        "end": settled() - before,
        "frozen": sum(p.nbytes for part in (model.vlm, model.vae) for p in part.parameters()),
        "trainable": sum(4 * p.ds_numel for part in (model.bridge, model.dit) for p in part.parameters()),
        "largest": max(largest),
    }


def test_a_rank_that_shards_as_it_builds_never_has_the_whole_model(backbones: Backbones):
    # Beside the weights there are buffers: position embeddings, rotary frequencies.
    buffers = 100_000
    (late, *_), (early, *_) = (on_ranks(2, builds, backbones, by_blocks) for by_blocks in (False, True))
    in_shards = late["frozen"] + late["trainable"] / 2
    assert late["peak"] >= late["frozen"] + late["trainable"]
    assert in_shards <= late["end"] < in_shards + buffers
    assert early["largest"] < early["trainable"] / 5
    assert early["peak"] < in_shards + early["largest"] + buffers
    assert in_shards <= early["end"] < in_shards + buffers


def remembers(rank: int, world: int, backbones: Backbones) -> tuple[int, int]:
    """Gathered matrices that autograd holds from forward to backward; and with torch's own linear layers."""
    model, encoder, run = Case().model(backbones), PromptEncoder(backbones.vlm), Case().run
    loss = FlowMatchingLoss(model, run)
    engine = Zero3Engine(model, loss, run, Topology(rank, world), CPU)
    matrices = {tuple(p.ds_shape) for p in model.parameters() if hasattr(p, "ds_id") and p.ds_numel > zero3.PERSISTENT}
    matrices |= {shape[::-1] for shape in matrices}

    def held() -> int:
        found = []

        def keep(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) in matrices and not isinstance(tensor, nn.Parameter):
                found.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.accumulate([make_batch(encoder, [rank], following=1 - rank)], 0)
        return len(found)

    ours = held()
    for module in (*model.bridge.modules(), *model.dit.modules()):
        if type(module) is zero3._SavingLinear:
            module.__class__ = nn.Linear
    return ours, held()


def test_autograd_remembers_no_gathered_weight(backbones: Backbones):
    for ours, torchs_own in on_ranks(2, remembers, backbones):
        assert ours == 0
        assert torchs_own > 30, "torch no longer holds views of weights, so this proves nothing"


ALONE = """
import os, sys
import torch
from tests.parallel.toy import Toy, toy_run
from wemmu.parallel.topology import Topology
from wemmu.parallel.zero3 import Zero3Engine

assert "deepspeed" not in sys.modules, "it is slow to import"
known = dict(os.environ)
toy = Toy()
engine = Zero3Engine(toy, toy.loss, toy_run(), Topology(), torch.device("cpu"))
engine.accumulate([0.5, 1.0, 2.0], 0)
assert engine.step(1.0) > 0
changed = {name for name in known | os.environ if known.get(name) != os.environ.get(name)}
assert changed <= {"LOCAL_RANK", "DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK"}, changed
try:
    Zero3Engine(Toy().requires_grad_(False), toy.loss, toy_run(), Topology(), torch.device("cpu"))
except ValueError as error:
    assert "nothing to train" in str(error)
"""


@pytest.mark.slow
def test_a_process_alone_says_nothing_and_touches_no_launchers_environment():
    root, variables = Path(__file__).parents[2], {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=root, env=variables, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
