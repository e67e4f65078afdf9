"""Score a model: `wemmu evaluate RUN` on the miniature's held-out requests, `--benchmark NAME` on a benchmark."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wemmu import batch_job
from wemmu.command_line import AsJson, Ema, UsageError, plainly, program, start
from wemmu.config import ConfigError, StageRun, load_stages
from wemmu.config.benchmarks import OPTIONS, RESULTS, card_folder, from_pairs, options
from wemmu.config.checkpoints import CHECKPOINTS, MANIFEST, no_checkpoint, trained_stage
from wemmu.config.files import nearest
from wemmu.readable import valid
from wemmu.source import choose_device, open_pipeline

if TYPE_CHECKING:
    from wemmu.evaluation.benchmark import BenchmarkRequest
    from wemmu.evaluation.generation import Draw
    from wemmu.sampling.request import Response


@plainly()
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="RUN (its newest finished stage) or RUN/STAGE; for a benchmark also an export, or a folder of images.",
        ),
    ],
    prompts: Annotated[int | None, typer.Option(min=1, help="Requests per task; default: evaluation.prompts.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint; default: the newest.")] = None,
    ema: Ema = None,
    benchmark: Annotated[str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(OPTIONS)}.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Option of the benchmark, e.g. encoders.clip=DIR. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for the benchmark's images and result card; default: see docs/evaluation.md."
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Delete images of an earlier checkpoint or of other settings in the folder."),
    ] = False,
    only: Annotated[
        str | None, typer.Option(metavar="STEP", help="`generate` images only, or `score` existing images only.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a trained stage on held-out requests, or run a benchmark."""
    if only not in (None, "generate", "score"):
        raise UsageError(f"--only {only} is unknown; {valid(only, ('generate', 'score'), 'valid choices')}")
    step: Any = only
    for_benchmarks = {"--set": set_, "--out": out, "--replace": replace}
    if benchmark is None and (unused := [name for name, value in for_benchmarks.items() if value]):
        raise UsageError(f"{unused[0]} needs --benchmark NAME; valid names: {', '.join(OPTIONS)}")
    if benchmark is not None and benchmark not in OPTIONS:
        raise UsageError(f"--benchmark {benchmark} is unknown; {valid(benchmark, OPTIONS, 'valid choices')}")
    if out is not None and not nearest(out).is_dir():
        raise UsageError(f"--out {out} cannot be a folder: {nearest(out)} is a file; give another name")
    if benchmark is not None and prompts is not None:
        raise UsageError("--prompts is for a stage; of a benchmark that has prompts, say --set prompts=N")
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        if benchmark is None:
            found = _of_stage(source, prompts, checkpoint, ema, step, device)
        else:
            values = from_pairs(set_ or ())
            found = _benchmark(source, benchmark, values, checkpoint, ema, out, step, device, replace)
    if as_json:
        print(json.dumps(found, indent=1))


def _of_stage(
    source: Path, prompts: int | None, checkpoint: Path | None, ema: bool | None, only: Any, device: str | None
) -> dict[str, Any] | None:
    folder, run = trained_stage(source, ema, checkpoint)
    number = prompts or run.evaluation.prompts
    if number == 0:
        raise UsageError(f"{run.stage.name}: evaluation.prompts is 0; give --prompts N with N > 0")
    # Bad input is refused above, before torch and the models are imported.
    from wemmu.evaluation.shapes.results import evaluate, lines

    place = _device(device, run)
    chosen = _checkpoint(folder, checkpoint)
    model = _Stage(run, chosen, ema, place)
    what = f"the average (EMA) in {chosen.name}" if run.stage.averages(ema) else chosen.name
    print(f"{run.stage.name}: scoring {what}, {number} requests of each task", flush=True)
    results = evaluate(run, number, folder, model.open, model.settings(), only)
    if results is not None:
        print(*lines(results), sep="\n")
        print(f"{run.stage.name}: scores in {folder / RESULTS}", flush=True)
    return results


def _device(named: str | None, run: StageRun | None) -> Any:
    """Return the device of this rank, and set the number of threads: each rank of a node takes a GPU."""
    import torch

    if run is not None and run.threads is not None:
        torch.set_num_threads(run.threads)
    gpus, local = torch.cuda.device_count(), int((batch_job.task() | os.environ).get("LOCAL_RANK", 0))
    return choose_device(named or (f"cuda:{local % gpus}" if gpus else None))


def _checkpoint(folder: Path, given: Path | None) -> Path:
    from wemmu.checkpoint.retention import latest

    if (chosen := given or latest(folder / CHECKPOINTS)) is None:
        raise no_checkpoint(folder)
    return chosen


def _benchmark(
    source: Path,
    name: str,
    values: dict[str, Any],
    checkpoint: Path | None,
    ema: bool | None,
    out: Path | None,
    only: Any,
    device: str | None,
    replace: bool,
) -> dict[str, Any] | None:
    exported = (source / "model_index.json").is_file()
    others = not exported and source.is_dir() and not (source / "config.yaml").is_file() and not load_stages(source)
    if (exported or others) and (checkpoint or ema is not None):
        raise UsageError(f"{source} is not a run, and only runs have checkpoints; leave out --checkpoint and --ema")
    if others and not any(source.iterdir()):
        raise ConfigError(f"{source} is empty; valid: a run, a stage, an export, or a folder with a benchmark's images")
    stage, run = (None, None) if exported or others else trained_stage(source, ema, checkpoint)
    # What the config of the run says, unless --set says otherwise.
    configured = run.evaluation.after(run.stage).get(name) if run else None
    checked = options(name, _merged(configured.model_dump() if configured else {}, values))
    from wemmu.evaluation.run_benchmark import run_benchmark

    place = _device(device, run)
    opened: Any = source
    if others:
        described: dict[str, Any] = {"model": {"images": source.name}}
        folder = out or source.with_name(f"{source.name}-{name}")
    elif run is None or stage is None:
        model: Any = _Export(source, place)
        opened, described = model.open, model.settings()
        folder = out or source.with_name(f"{source.name}-{name}")
    else:
        model = _Stage(run, _checkpoint(stage, checkpoint), ema, place)
        opened, described = model.open, model.settings()
        folder = out or card_folder(stage, name)
    card = run_benchmark(name, checked, run, folder, opened, described, only, replace)
    if card is not None:
        for title, one in card["scores"].items():
            print(f"{title:32} {one['value']:8.4f}  [{one['low']:.4f}, {one['high']:.4f}]", flush=True)
        print(f"{card['n']} images; card in {folder / 'card.json'}, page in {folder / 'index.html'}", flush=True)
    return card


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested options with changes."""
    nested = {
        name: _merged(base[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return base | changes | nested


class _Stage:
    """A stage's checkpoint as a model of benchmarks."""

    def __init__(self, run: StageRun, checkpoint: Path, ema: bool | None, device: Any):
        self.run, self.checkpoint, self.ema, self.device = run, checkpoint, ema, device

    def settings(self) -> dict[str, Any]:
        from wemmu.checkpoint.manifest import read_manifest, sha256_of
        from wemmu.recipes.recipe import recipe_class

        manifest = read_manifest(self.checkpoint)
        return {
            "model": {
                "stage": manifest.stage,
                "step": manifest.step,
                "checkpoint": sha256_of(self.checkpoint / MANIFEST),
                "ema": self.run.stage.averages(self.ema),
                "frozen": dict(manifest.frozen),
            },
            "sampling": recipe_class(self.run).sampling(self.run),
            "resolution": self.run.stage.resolution,
            "dtype": self.run.backbones.dtype,
            "device": self.device.type,
        }

    def open(self) -> "Draw":
        from wemmu.evaluation.generation import request_of
        from wemmu.training.build import load_trained

        made = load_trained(self.run, self.checkpoint, self.ema, self.device)

        def draw(requests: Sequence["BenchmarkRequest"]) -> list["Response"]:
            groups: dict[tuple[int, int], list[tuple[int, list[tuple[int, int]]]]] = {}
            for i, request in enumerate(requests):
                size = request.size or (self.run.stage.resolution, self.run.stage.resolution)
                own = [size] * len(request.images)
                if made.sizes is not None:
                    size, own = made.sizes.of([(i.height, i.width) for i in request.images], request.size)
                groups.setdefault(size, []).append((i, own))
            found: dict[int, Response] = {}
            for size, members in groups.items():
                asked = request_of([requests[i] for i, _ in members], size, [own for _, own in members])
                found |= zip((i for i, _ in members), made.respond(asked), strict=True)
            return [found[i] for i in range(len(requests))]

        return draw


class _Export:
    """An exported pipeline as a model of benchmarks."""

    def __init__(self, directory: Path, device: Any):
        self.directory, self.device = directory, device

    def settings(self) -> dict[str, Any]:
        from wemmu.published.identity import identity
        from wemmu.published.layout import read_json

        # A checkpoint's hash: of the weights of every component.
        parts = sorted({file.parent for file in self.directory.glob("*/*.safetensors")})
        index = read_json(self.directory / "model_index.json")
        numbers = {name: value for name, value in index.items() if isinstance(value, int | float)}
        return {
            "model": {
                "weights": {part.name: str(identity(part)) for part in parts if any(part.glob("*.safetensors*"))}
            },
            "sampling": numbers | {"solver": index.get("solver", "euler")},
            "resolution": index.get("resolution"),
            # As `from_pretrained` loads it without `torch_dtype`.
            "dtype": "float32",
            "device": self.device.type,
        }

    def open(self) -> "Draw":
        from wemmu.sampling.request import Response

        pipe: Any = open_pipeline(self.directory)
        pipe.to(self.device)
        pipe.set_progress_bar_config(disable=True)

        def draw(requests: Sequence["BenchmarkRequest"]) -> list[Response]:
            height, width = requests[0].size or (None, None)
            texts, images = [r.text for r in requests], [list(r.images) for r in requests]
            seeds = [request.seed for request in requests]
            made = pipe(texts, image=images, height=height, width=width, seed=seeds)
            return [Response(image) for image in made.images]

        return draw


if __name__ == "__main__":
    start(program(main))
