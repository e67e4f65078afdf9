"""What conversion costs in memory: the most that a process of its own held, over what it held when it began.

    OMP_NUM_THREADS=1 python -m benchmarks.convert      # a few minutes, 5 GB of scratch

The model has the miniature's classes with a wide pathway and a DiT of many blocks, so that all of it is much larger
than its largest tensor; weights are random. Each conversion is a process of its own, which has imported everything
before: it notes what it holds, converts, and notes the most it held from then on (VmHWM, which counts pages of mapped
files, too).
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import safe_open
from torch import nn

from benchmarks.measure import RESULTS, ROOT, Memory, Out, Quick, save, table, watch
from tests.models.on_disk import make_backbones
from tools.convert_ckpt import Source, export, return_what_is_freed
from tools.export.skeleton import identities, shapes, skeleton
from tools.foreign.checkpoint import write_checkpoint
from tools.foreign.zero.folder import read_folder
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.state import TrainState
from wemmu.checkpoint.stored import export_weights
from wemmu.config import StageRun, dump, load_curriculum

WORLD = 2
# In MB of 10^6 bytes.
MIB = 2**20 / 1e6


@dataclass(frozen=True)
class Sizes:
    """Layers of the VLM (and so of the pathway), its feed-forward's width, blocks of the DiT."""

    layers: int
    width: int
    blocks: int


FULL = Sizes(layers=6, width=40_000, blocks=8)
QUICK = Sizes(layers=2, width=640, blocks=2)


def main(quick: Quick = False, out: Out = RESULTS) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = make_run(folder, QUICK if quick else FULL)
        rows = [measure(what, work, folder, run) for what, work in CONVERSIONS.items()]
    write(rows, out)


def make_run(folder: Path, sizes: Sizes) -> StageRun:
    """Backbones and a run's stage under `folder`, with a checkpoint and a folder as DeepSpeed's ZeRO-3 leaves it."""
    text = {"num_hidden_layers": sizes.layers, "intermediate_size": sizes.width}
    backbones = make_backbones(folder, text=text, dit={"num_layers": sizes.blocks})
    curriculum = load_curriculum(ROOT / "configs/shapes/curriculum.yaml")
    run = curriculum.model_copy(update={"backbones": backbones}).stage_run("stage2")
    (folder / "run" / "stage2").mkdir(parents=True)
    dump(run, folder / "run" / "stage2" / "config.yaml")
    weights = {name: torch.randn(shape) for name, shape in shapes(skeleton(run)).items()}
    frozen = {part: sha256 for part, sha256 in identities(run).items() if part != "dit"}
    origin = Origin("stage2", run.seed, run.stage.resolution, frozen)
    store.save(folder / "run/stage2/checkpoints", TrainState(weights, weights, weights, 2), {}, origin)
    save_zero3(folder / "zero3", weights)
    return run


def save_zero3(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The files that `DeepSpeedEngine.save_checkpoint` writes under ZeRO-3 on `WORLD` ranks, what is read of them."""
    folder.mkdir()
    none = ("frozen_param_shapes", "frozen_param_fragments", "shared_params", "buffer_names")
    frozen: dict[str, Any] = {name: {} for name in none}
    counted = {"dp_world_size": WORLD, "global_steps": 2, "skipped_steps": 0, "ds_version": "layout of 0.19.8"}
    sizes = [{name: weight.shape for name, weight in weights.items()}]
    for rank in range(WORLD):
        parts = [nn.functional.pad(w.flatten(), (0, w.numel() % WORLD)).chunk(WORLD)[rank] for w in weights.values()]
        flat = torch.cat(parts)
        adam = {"state": {0: {"exp_avg": flat, "exp_avg_sq": flat.clone(), "step": 2}}, "param_groups": []}
        state = {"zero_stage": _stage_3(), "partition_count": WORLD, "fp32_flat_groups": [flat.clone()]}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"module": {}, "param_shapes": sizes} | frozen | counted, folder / f"{name}_model_states.pt")
        state = {"optimizer_state_dict": state | {"optimizer_state_dict": adam}}
        torch.save(state, folder / f"{name}_optim_states.pt")


def _stage_3() -> Any:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return ZeroStageEnum.weights


def to_pipeline(folder: Path, run: StageRun, name: str = "pipeline", images: bool = False) -> None:
    (step,) = (folder / "run/stage2/checkpoints").iterdir()
    export(Source(run, folder / "run" / "stage2", step), folder / name, "float32", False, forward=images)


def to_start(folder: Path, run: StageRun) -> None:
    export_weights(folder / "pipeline", folder / "start", torch.float16)


def from_deepspeed(folder: Path, run: StageRun) -> None:
    write_checkpoint(read_folder(folder / "zero3"), run, folder / "imported", {})


Work = Callable[[Path, StageRun], None]
CONVERSIONS: dict[str, Work] = {
    "checkpoint -> pipeline, --no-forward": to_pipeline,
    "pipeline -> weights to start from": to_start,
    "DeepSpeed ZeRO-3 -> checkpoint, moments too": from_deepspeed,
    "checkpoint -> pipeline, images compared": partial(to_pipeline, name="again", images=True),
}


def measure(what: str, work: Work, folder: Path, run: StageRun) -> dict[str, Any]:
    """One conversion in a process of its own; sizes in MB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        memory, seconds = process.submit(_convert, work, folder, run).result()
    with safe_open(folder / "pipeline/bridge/diffusion_pytorch_model.safetensors", "pt") as file:
        largest = max(file.get_tensor(name).nbytes for name in file.keys()) / 1e6  # noqa: SIM118
    source = folder / "zero3" if what.startswith("DeepSpeed") else folder / "pipeline"
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) / 1e6
    found = {"size": size, "largest": largest, "over": (memory.peak - memory.before) * MIB, "base": memory.before * MIB}
    return {"conversion": what, **found, "seconds": seconds}


def _convert(work: Work, folder: Path, run: StageRun) -> tuple[Memory, float]:
    torch.set_num_threads(1)
    return_what_is_freed()
    begun = time.perf_counter()
    with watch(torch.device("cpu")) as memory:
        work(folder, run)
    return memory, time.perf_counter() - begun


def write(rows: list[dict[str, Any]], out: Path) -> None:
    about = "Peak memory of a process over what it held after its imports; MB of 10^6 bytes."
    columns = "conversion", "all of it, MB", "largest tensor, MB", "peak over base, MB", "in largest tensors", "seconds"
    cells = (
        [r["conversion"], f"{r['size']:.0f}", f"{r['largest']:.1f}", f"{r['over']:.0f}",
         f"{r['over'] / r['largest']:.1f}", f"{r['seconds']:.0f}"] for r in rows
    )  # fmt: skip
    save(out, "convert", [about, "", *table(columns, cells)], rows)


if __name__ == "__main__":
    typer.run(main)
