"""DeepSpeed's own folders, written by DeepSpeed on two and three ranks, become checkpoints with the same bits."""

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from tests.checkpoints import load_state
from tests.export.folders import STEPS, TABLE, TAG, Content, Saved, save_folder, universal
from tests.models.on_disk import make_backbones
from tests.models.world import micro_batches
from tests.parallel.cases import ALL, EDIT, GLOBAL_BATCH
from tests.parallel.ranks import on_ranks
from tools.convert_ckpt import main
from tools.export.skeleton import identities
from tools.foreign.checkpoint import rename
from tools.foreign.folder import Folder, FolderError
from tools.foreign.zero.folder import read_folder
from tools.foreign.zero.pickles import load
from wemmu.checkpoint.manifest import verify
from wemmu.checkpoint.start import start_from
from wemmu.checkpoint.store import MOMENTS, WEIGHTS
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun, dump
from wemmu.config.schema import Backbones
from wemmu.parallel.single import SingleEngine
from wemmu.prompts import PromptEncoder
from wemmu.recipes.staged import startable
from wemmu.recipes.wemmu.config import Queries, WeMMU
from wemmu.recipes.wemmu.loss import FlowMatchingLoss

CASES = {
    "ZeRO-1": Saved(stage=1, world=2),
    "ZeRO-2 in bf16, padded": Saved(stage=2, world=3, dtype="bfloat16"),
    "ZeRO-2, all trained": Saved(stage=2, world=2, trains=ALL),
    "ZeRO-3, padded": Saved(stage=3, world=3),
    "ZeRO-3 in bf16 without the frozen": Saved(stage=3, world=2, dtype="bfloat16", without_frozen=True),
}


@dataclass(frozen=True)
class Made:
    folder: Path
    saved: Saved
    content: Content


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    return make_backbones(tmp_path_factory.mktemp("small"), layers=2)


@pytest.fixture(scope="module")
def make(small: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each folder is made once, when the first test asks for it."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            folder, saved = tmp_path_factory.mktemp("folder"), CASES[name]
            content = on_ranks(saved.world, save_folder, folder, small, saved)[0]
            made[name] = Made(folder, saved, content)
        return made[name]

    return get


@pytest.fixture
def stage(small: Backbones, tmp_path: Path) -> Path:
    """A run's stage, by its config alone."""
    (tmp_path / "stage").mkdir()
    dump(run_of(small), tmp_path / "stage" / "config.yaml")
    return tmp_path / "stage"


def run_of(backbones: Backbones) -> StageRun:
    """The run whose bridge the cases build."""
    run = Saved(2, 2, trains=ALL).case.run
    bridge = run.recipe.bridge.model_copy(update={"queries": Queries(number=9), "position_table": 8})
    return run.model_copy(update={"backbones": backbones, "recipe": WeMMU(bridge=bridge)})


def check(folder: Folder, made: Made, frozen: bool) -> None:
    """Everything that DeepSpeed said it had is there, bit for bit, and nothing else."""
    content, found = made.content, folder.parameters
    expected = content.weights | (content.frozen if frozen else {})
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].trained == (name in content.weights)
        assert torch.equal(found[name].parts[WEIGHTS].read(), torch.from_numpy(weight)), name
    assert folder.has_moments
    for name, moments in content.moments.items():
        for moment in MOMENTS:
            assert torch.equal(found[name].parts[moment].read(), torch.from_numpy(moments[moment])), (name, moment)
    assert folder.step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_and_moment_comes_back_bit_for_bit(make: Callable[[str], Made], name: str):
    made = make(name)
    check(read_folder(made.folder), made, frozen=not made.saved.without_frozen)


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-2 in bf16, padded", "ZeRO-3, padded"])
def test_a_universal_folder_comes_back_with_the_frozen_that_deepspeed_itself_does_not_restore(
    make: Callable[[str], Made], tmp_path: Path, name: str
):
    universal(make(name).folder, tmp_path / "universal")
    check(read_folder(tmp_path / "universal"), make(name), frozen=True)


def test_training_goes_on_as_deepspeed_would_have(
    make: Callable[[str], Made], small: Backbones, stage: Path, tmp_path: Path
):
    made = make("ZeRO-2, all trained")
    main(made.folder, checkpoint=tmp_path / "checkpoints", stage=stage, rename=[f"{o}={n}" for o, n in TABLE.items()])
    run, model = run_of(small), made.saved.case.model(small)
    engine = SingleEngine(model, FlowMatchingLoss(model, run), run)
    state = engine.state()
    manifest = load_state(tmp_path / "checkpoints" / f"step_{STEPS:08}", state)
    engine.on_restore(manifest.step)
    for name, weight in engine.state().weights.items():
        assert torch.equal(weight, torch.from_numpy(made.content.weights[f"wemmu.{name}"]))
    ids = [100 * STEPS + i for i in range(GLOBAL_BATCH)]
    engine.accumulate(micro_batches(PromptEncoder(small.vlm), ids, EDIT, 0, 1, 1), STEPS)
    engine.step(1.0)
    moved = 0.0
    for name, weight in engine.state().weights.items():
        after = torch.from_numpy(made.content.after[f"wemmu.{name}"])
        torch.testing.assert_close(weight, after, atol=2e-5, rtol=0)
        moved = max(moved, float((after - torch.from_numpy(made.content.weights[f"wemmu.{name}"])).abs().max()))
    assert moved > 5e-4, "the step is far larger than what it may differ by"


def test_a_folder_starts_a_stage_and_its_report_tells_all_of_it(
    make: Callable[[str], Made], small: Backbones, stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made, root = make("ZeRO-3, padded"), tmp_path / "checkpoints"
    main(made.folder, checkpoint=root, stage=stage, rename=[f"{o}={n}" for o, n in TABLE.items()])
    (written,) = root.iterdir()
    assert "0 missing, 0 unexpected, 2 left out" in capsys.readouterr().out
    manifest, report = verify(written), json.loads((written / "parity.json").read_text())
    assert (manifest.step, manifest.seed, "dit" in manifest.frozen) == (STEPS, run_of(small).seed, False)
    assert report["left_out"] == ["extra.weight", "extra.bias"]
    assert len(report["tensors"]) == len(manifest.tensors) + 2 * len(manifest.trained)
    model = made.saved.case.model(small)
    start_from(written, startable(model), identities(run_of(small)))
    for name, weight in (made.content.weights | made.content.frozen).items():
        if not name.startswith("extra."):
            assert torch.equal(model.get_parameter(name.removeprefix("wemmu.")), torch.from_numpy(weight)), name
    with pytest.raises(SystemExit, match="exists and stays unchanged"):
        main(made.folder, checkpoint=root, stage=stage, rename=[f"{o}={n}" for o, n in TABLE.items()])
    assert list(root.iterdir()) == [written]


def test_a_frozen_dit_that_was_not_saved_is_the_backbone(
    make: Callable[[str], Made], small: Backbones, stage: Path, tmp_path: Path
):
    made = make("ZeRO-3 in bf16 without the frozen")
    main(made.folder, checkpoint=tmp_path / "checkpoints", stage=stage, rename=["wemmu.="])
    stored = StoredTensors(tmp_path / "checkpoints" / f"step_{STEPS:08}")
    assert {name.split(".")[0] for name in stored.manifest.tensors} == {"bridge"}
    assert stored.manifest.frozen == identities(run_of(small))
    for name, weight in made.content.weights.items():
        assert torch.equal(stored.read(name.removeprefix("wemmu.")), torch.from_numpy(weight)), name


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], r"missing bridge\..* unexpected extra\.bias"),
        (["wemmu.="], r"missing nothing, unexpected extra\.bias, extra\.weight"),
        (["wemmu.=", "extra.=-", "wemmu.bridge.vae_branch.=-"], r"missing bridge\.vae_branch\.linear\.bias"),
        (["wemmu.=", "extra.=-", "other.=x."], r"--rename other\.=\.\.\. fits no name"),
        (["wemmu.=", "extra"], "is not OLD=NEW"),
    ],
)
def test_names_that_do_not_fit_are_told(
    make: Callable[[str], Made], stage: Path, tmp_path: Path, table: list[str], words: str
):
    with pytest.raises(SystemExit, match=words):
        main(make("ZeRO-3, padded").folder, checkpoint=tmp_path / "checkpoints", stage=stage, rename=table)
    assert not (tmp_path / "checkpoints").exists()


def test_the_longest_prefix_counts_and_no_two_names_become_one():
    table = {"a.": "x.", "a.b.": "y.", "a.b.c": "-"}
    assert rename(["a.p", "a.b.p", "a.b.c"], table) == {"a.p": "x.p", "a.b.p": "y.p", "a.b.c": None}
    with pytest.raises(ValueError, match=r"makes x\.p of both x\.p and a\.p"):
        rename(["x.p", "a.p"], {"a.": "x."})


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*rank_1*optim_states.pt"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    make: Callable[[str], Made], tmp_path: Path, pattern: str
):
    folder = shutil.copytree(make("ZeRO-1").folder, tmp_path / "folder")
    (file,) = (folder / TAG).glob(pattern)
    held = torch.load(file, weights_only=False)
    torch.save({"client_state": Evil(f"touch '{tmp_path / 'was here'}'")} | held, file)
    with pytest.raises(FolderError, match=rf"{file.name} names posix\.system"):
        read_folder(folder)
    assert not (tmp_path / "was here").exists()
    # It would have, and only then cannot go on.
    with zipfile.ZipFile(file) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        unpickler = pickle.Unpickler(archive.open(name))
        unpickler.persistent_load = lambda _: torch.UntypedStorage(10**8)
        with contextlib.suppress(Exception):
            unpickler.load()
    assert (tmp_path / "was here").exists()


class Stage:
    """A stage of ZeRO as Python 3.11.0 to 3.11.3 pickles it."""

    def __reduce__(self) -> tuple:
        return getattr, (ZeroStageEnum, "weights")


def test_a_file_of_an_early_python_3_11_is_read(tmp_path: Path):
    torch.save({"stage": Stage(), "step": 3}, tmp_path / "early.pt")
    assert load(tmp_path / "early.pt")["step"] == 3


def test_an_object_of_somebodys_own_is_refused_by_name(tmp_path: Path):
    torch.save({"args": pytest.approx(1.0)}, tmp_path / "mine.pt")
    with pytest.raises(FolderError, match=r"names .*ApproxScalar"):
        load(tmp_path / "mine.pt")


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """A bit of the last value in the middle of the file, where only numbers are."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 64]))


@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.parametrize("kind", ["model_states", "optim_states"])
def test_a_file_of_a_rank_that_is_missing_or_damaged_is_named(
    make: Callable[[str], Made], tmp_path: Path, damage: Callable[[Path], None], kind: str
):
    folder = shutil.copytree(make("ZeRO-3, padded").folder, tmp_path / "folder")
    for rank in (0, 2):
        copy = shutil.copytree(folder, tmp_path / f"copy{rank}")
        (file,) = (copy / TAG).glob(f"zero_pp_rank_{rank}_*{kind}.pt")
        damage(file)
        with pytest.raises(FolderError, match=rf"{file.name} is (missing|damaged)"):
            read_folder(copy)


def test_files_of_another_save_or_another_parallelism_are_named(make: Callable[[str], Made], tmp_path: Path):
    source = make("ZeRO-1").folder
    for there, new, words in (
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt", "of another save"),
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "tensor, pipeline or expert parallelism"),
        ("mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt", "tensor, pipeline or expert parallelism"),
    ):
        folder = shutil.copytree(source, tmp_path / new)
        shutil.copy(folder / TAG / there, folder / TAG / new)
        with pytest.raises(FolderError, match=rf"{new} is .*{words}"):
            read_folder(folder)


def test_what_is_no_folder_of_zero_says_so(stage: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="neither a DeepSpeed folder"):
        main(tmp_path, checkpoint=tmp_path / "out", stage=stage)
    (tmp_path / "inside" / "global_step4").mkdir(parents=True)
    (tmp_path / "inside" / "latest").write_text("global_step4")
    with pytest.raises(SystemExit, match=f"meant may be one of those inside: {tmp_path / 'inside'}$"):
        main(tmp_path, checkpoint=tmp_path / "out", stage=stage)
    with pytest.raises(SystemExit, match="go together"):
        main(tmp_path, checkpoint=tmp_path / "out")
    torch.save({"module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(SystemExit, match="not saved under ZeRO"):
        main(tmp_path, checkpoint=tmp_path / "out", stage=stage)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(FolderError, match="not a folder beside it"):
        read_folder(tmp_path)
