"""Host memory while the ranks of one node load a model: `python -m benchmarks.loading [--ranks 8] [--width 768]`.

Writes backbones of the real classes with random weights in bfloat16, lets forked ranks build a stage's model, sharded,
and samples the memory of all of them from /proc/PID/smaps_rollup. PSS counts a page that several processes share once,
so the sum is what the node holds. The same with tiny backbones is subtracted: what libraries and process groups take.
 On a CPU a rank's shards and its copy of the frozen parts are host memory, too.
"""

import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from benchmarks.step_sizes import make_run, second
from tests.models.on_disk import make_backbones
from wemmu.config import StageRun
from wemmu.config.schema import Backbones, Parallel
from wemmu.config.task import Task
from wemmu.parallel.topology import Topology
from wemmu.recipes.recipe import ready_to_train, recipe
from wemmu.training.build import make_engine, place_blocks
from wemmu.training.start import fill_from

# Imported once, before the ranks are forked: what libraries take is not of loading.
PRELOADED = ("deepspeed", "wemmu.backbones.sana.tensor", "wemmu.parallel.hybrid", "wemmu.recipes.wemmu.recipe")
ENGINES: dict[str, dict[str, Any]] = {
    "zero3": {"engine": "zero3"},
    "hybrid tp 2": {"engine": "hybrid", "tp": 2},
    "hybrid tp 2 pp 2": {"engine": "hybrid", "tp": 2, "pp": 2},
}


def write_backbones(root: Path, width: int, layers: int) -> Backbones:
    """Backbones of `width` channels and `layers` layers in bfloat16, the autoencoder as in the miniature."""
    text = {"hidden_size": width, "intermediate_size": 4 * width}
    text |= {"num_attention_heads": width // 32, "num_key_value_heads": width // 64}
    dit = {"num_attention_heads": width // 32, "num_cross_attention_heads": width // 32, "cross_attention_dim": width}
    torch.set_default_dtype(torch.bfloat16)
    made = make_backbones(root, layers, text, dit)
    torch.set_default_dtype(torch.float32)
    return made.model_copy(update={"dtype": "bfloat16"})


def stage(backbones: Backbones, parallel: dict[str, Any], ranks: int) -> StageRun:
    """A stage that trains everything."""
    run = make_run(second(Task.T2I, 32, ranks), "single", "bfloat16")
    return run.model_copy(update={"backbones": backbones, "parallel": Parallel(**parallel, ranks=ranks)})


def load(run: StageRun, rank: int, world: int, store: str, pipe: Any) -> None:
    """A rank: build the model and the engine, then wait."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    pipe.send("ready")
    pipe.recv()
    topology, device = Topology(rank, world, run.parallel.tp, run.parallel.pp), torch.device("cpu")
    made = recipe(run, place_blocks(run, device), device)
    ready_to_train(made, run)
    empty = {name for name, parameter in made.model.named_parameters() if parameter.is_meta}
    if empty:
        # As `fill_empty`, but without the optimizer's moments. Under zero3 all is loaded before its engine is made.
        engine = make_engine(run, made.model, made.loss, topology, device)
        sources = made.sources(every=True)
        fill_from({name: sources[name] for name in empty}, engine.local_parameters(empty))
    dist.barrier()
    pipe.send("loaded")
    pipe.recv()
    os._exit(0)


def held(processes: Iterable[BaseProcess]) -> int:
    """Bytes of processes together, shared pages by their share."""
    files = (Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8") for process in processes)
    return sum(1024 * int(line.split()[1]) for text in files for line in text.splitlines() if line.startswith("Pss:"))


def measure(run: StageRun, ranks: int) -> dict[str, float]:
    """Bytes of all ranks beyond what they held before: at the peak and at the end."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(ranks)]
        processes = [
            context.Process(target=load, args=(run, rank, ranks, f"{folder}/store", there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for here, _ in pipes:
            here.recv()
        before = held(processes)
        begun = time.monotonic()
        for here, _ in pipes:
            here.send("go")
        peak = end = 0
        waiting = {here for here, _ in pipes}
        while waiting:
            end = held(processes) - before
            peak = max(peak, end)
            waiting -= {here for here in waiting if here.poll()}
            if dead := [process.exitcode for process in processes if process.exitcode is not None]:
                raise RuntimeError(f"a rank ended with {dead[0]}")
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        end = held(processes) - before
        for process in processes:
            process.kill()
            process.join()
    return {"peak": peak, "end": end, "seconds": seconds}


def main(
    ranks: Annotated[int, typer.Option(help="Ranks of the node.")] = 8,
    width: Annotated[int, typer.Option(help="Channels of the backbones.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of the VLM, and blocks of the DiT.")] = 12,
    engine: Annotated[list[str] | None, typer.Option(help=f"Repeatable; {', '.join(ENGINES)}. Default: all.")] = None,
) -> None:
    if unknown := set(engine or ()) - ENGINES.keys():
        sys.exit(f"there is no engine {', '.join(sorted(unknown))}; valid: {', '.join(ENGINES)}")
    for module in PRELOADED:
        import_module(module)
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        backbones = write_backbones(root / "large", width, layers)
        tiny = write_backbones(root / "tiny", 64, 2)
        vlm, dit = (megabytes(root / "large" / name) for name in ("vlm", "sana/transformer"))
        print(f"{ranks} ranks; MB in bfloat16: VLM {vlm:.0f}, DiT {dit:.0f}, one layer {dit / layers:.0f}")
        for name in engine or ENGINES:
            small, large = (measure(stage(used, ENGINES[name], ranks), ranks) for used in (tiny, backbones))
            peak, end = ((large[what] - small[what]) / 1e6 for what in ("peak", "end"))
            print(f"{name}: peak {peak:.0f} MB, end {end:.0f} MB, {large['seconds']:.0f} s", flush=True)


def megabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors")) / 1e6


if __name__ == "__main__":
    typer.run(main)
