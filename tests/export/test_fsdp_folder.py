"""A folder that FSDP2 saved on two ranks becomes a checkpoint with the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from tests.export.folders import BRIDGE_ONLY, Users
from tests.export.test_zero_folder import run_of
from tests.models.on_disk import make_backbones
from tests.parallel.cases import Case
from tests.parallel.ranks import on_ranks
from tools.convert_ckpt import main
from wemmu.checkpoint.store import MOMENTS, WEIGHTS
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import dump
from wemmu.config.schema import Backbones
from wemmu.recipes.wemmu.loss import FlowMatchingLoss

RENAME = ["app.model.wemmu.=", "app.model.extra.=-", "app.ema.=-"]


def save_folder(_rank: int, _world: int, out: Path, backbones: Backbones) -> dict[str, dict[str, np.ndarray]]:
    """Step twice on the bridge, save as torch's tutorials do, with an average beside; return what was saved."""
    case = Case(trains=BRIDGE_ONLY)
    model = case.model(backbones)
    module = Users(model, FlowMatchingLoss(model, case.run))
    for layer in module.wemmu.bridge.pathway.layers:
        fully_shard(layer)
    fully_shard(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(2):
        for p in trained:
            p.grad = p.detach() / 2
        adamw.step()
    weights, adam = get_model_state_dict(module), get_optimizer_state_dict(module, adamw)
    dcp.save({"app": {"model": weights, "ema": weights, "optim": adam}}, checkpoint_id=out)
    whole = lambda tensor: tensor.full_tensor().numpy()  # noqa: E731
    state = {name: {m: whole(of[m]) for m in MOMENTS} for name, of in adam["state"].items()}
    return {name: {WEIGHTS: whole(weight), **state.get(name, {})} for name, weight in weights.items()}


def test_weights_and_moments_come_back_bit_for_bit_and_what_is_missing_is_told(tmp_path: Path):
    backbones, folder, stage = make_backbones(tmp_path / "backbones", layers=2), tmp_path / "theirs", tmp_path / "stage"
    stage.mkdir()
    dump(run_of(backbones), stage / "config.yaml")
    saved = on_ranks(2, save_folder, folder, backbones)[0]
    main(folder, checkpoint=tmp_path / "checkpoints", stage=stage, rename=RENAME)
    stored = StoredTensors(tmp_path / "checkpoints" / "step_00000002")
    assert len(stored.manifest.trained) > 10
    names = {name: name.removeprefix("wemmu.") for name in saved if name.startswith("wemmu.")}
    assert set(names.values()) == stored.manifest.tensors.keys()
    for theirs, name in names.items():
        assert (name in stored.manifest.trained) == (len(saved[theirs]) == 3)
        for part, values in saved[theirs].items():
            assert torch.equal(stored.read(name, part), torch.from_numpy(values)), (name, part)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(SystemExit, match=r"theirs cannot be read.*__1_0\.distcp"):
        main(folder, checkpoint=tmp_path / "other", stage=stage, rename=RENAME)
    (folder / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(SystemExit, match=r"\.metadata cannot be read as an index"):
        main(folder, checkpoint=tmp_path / "other", stage=stage)
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
