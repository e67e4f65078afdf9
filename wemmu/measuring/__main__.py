"""Measure a model on its real classes: parameters, FLOPs and memory of a micro-batch, and the slices of a split DiT.

`python -m wemmu.measuring` is the process that `wemmu.planning.ask` starts: it reads a request from standard input and
writes a line of JSON for each item as soon as it is measured. Floating-point tensors are shapes without numbers
(`fake_world`), so a model of any size fits, and no weights are needed.
"""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from wemmu.backbones.adapters import DiTStage, class_of
from wemmu.backbones.quantized import quantizable
from wemmu.checkpoint.adapters import is_adapter
from wemmu.config.schema import StageRun
from wemmu.measuring.fake_world import fake_world
from wemmu.measuring.model import add_encoders, make_batch, make_model, vae_of, vlm_of
from wemmu.measuring.observe import Observed, PartNames
from wemmu.planning.ask import written
from wemmu.published.known import KNOWN
from wemmu.recipes.staged import Staged

# Processes at a time; each takes about 1 GB.
WORKERS = 4


def parameters(model: Staged, run: StageRun) -> dict[str, Any]:
    """Return the parameters of every part, what engines shard, and the sizes that give a sample's tokens."""
    parts, numbers, adapters, homes = PartNames(run.recipe.modules), Counter[str](), Counter[str](), dict[str, str]()
    for path, parameter in model.named_parameters():
        numbers[parts[path]] += parameter.numel()
        adapters[parts[path]] += parameter.numel() * is_adapter(path)
        inside = (part for part in model.sharded if path.startswith(f"{part}."))
        homes[parts[path]] = next(inside, path.split(".")[0])
    vlm = vlm_of(model)
    found: dict[str, Any] = {
        "parts": {**dict.fromkeys(run.recipe.modules, 0), **numbers},
        # Of the parts that learn by adapters, how many of their numbers these are.
        "adapters": {part: adapters[part] for part in model.adapters},
        "homes": homes,
        # Parts that are in float32 whatever the type of the backbones.
        "float32": sorted({path.partition(".")[0] for path in run.recipe.encoders}),
        # Layers that can be in 8 or 4 bit: numbers of each part, and of the largest layer.
        "quantizable": {},
        "sharded": list(model.sharded),
        # Numbers of the largest layer that engines shard.
        "layer": max((_size(one) for part in model.sharded for one in _layers(model.get_submodule(part))), default=0),
        **pixels(model),
        "latent_channels": vae_of(model).latent_channels if model.vae is not None else 0,
        "width": vlm.language_model.config.hidden_size,
    }
    for part, paths in run.recipe.quantizable.items():
        layers = {f"{path}.{n}": one for path in paths for n, one in quantizable(model.get_submodule(path)).items()}
        numbers = Counter()
        for name, layer in layers.items():
            numbers[parts[name]] += layer.weight.numel()
        largest = max(layer.weight.numel() for layer in layers.values())
        found["quantizable"][part] = {"numbers": numbers, "largest": largest}
    if "hybrid" in run.recipe.engines:
        wemmu: Any = model
        found["bridge"] = units(*wemmu.beside_dit())
    return found


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    return (one for group in part.modules() if isinstance(group, nn.ModuleList) for one in group)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pixels(model: Staged) -> dict[str, int]:
    """Return the sides of a VLM token and of a latent; without an autoencoder both are the token's."""
    token_px = vlm_of(model).token_px
    return {"token_px": token_px, "latent_px": vae_of(model).latent_px if model.vae is not None else token_px}


def units(root: nn.Module | DiTStage, blocks: nn.ModuleList) -> dict[str, Any]:
    """Return what FSDP2 gathers together: `layers` times `layer`, and the rest; [rows, row size, how often]."""
    inside = {id(p) for p in blocks.parameters()}

    def shapes(tensors: Iterable[Tensor]) -> list[list[int]]:
        rows = Counter((len(t), t.numel() // len(t)) for t in tensors)
        return [[*shape, count] for shape, count in rows.items()]

    rest = shapes(p for p in root.parameters() if id(p) not in inside)
    return {"layers": len(blocks), "layer": shapes(blocks[0].parameters()), "rest": rest}


def with_gradients(model: nn.Module | DiTStage) -> None:
    """Allocate gradients, as after the first micro-batch of a step."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def step(world: Observed, run: StageRun, shape: dict[str, Any]) -> dict[str, Any]:
    """Measure a micro-batch forward and backward: FLOPs by part, and bytes beside parameters and gradients."""
    model, loss = make_model(run)
    batch = make_batch(model, run, shape)
    with_gradients(model)
    world.start()
    with world.watching(model, PartNames(run.recipe.modules)):
        values = loss(batch, 0).values.sum()
        kept = world.kept()
        values.backward()
    flops: dict[str, list[int]] = {}
    for (part, phase), number in world.flops_of.items():
        if phase != "again":
            flops.setdefault(part, [0, 0])[phase == "backward"] += number
    peaks = {f"{phase} {part}": size for (part, phase), size in world.peaks.items()}
    return {"flops": flops, "kept": kept, "peaks": peaks, **pixels(model)}


def slices(world: Observed, run: StageRun, shape: dict[str, Any], tp: int, pp: int) -> dict[str, Any]:
    """Measure a micro-batch of the DiT in every stage of its pipeline, on the first tensor rank of each.

    Raises:
        ValueError: for degrees that cannot be, naming those that can.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    group = dist.group.WORLD
    assert group is not None, "it was made"
    samples, height, width = shape["samples"], shape["height"], shape["width"]
    try:
        places = []
        for place in range(pp):
            model: Any = make_model(run)[0]  # a `WeMMU`: the config has hybrid for its recipe only
            if place == 0:
                vae, dtype = vae_of(model), vlm_of(model).vlm.dtype
                points = torch.zeros(samples, vae.latent_channels, height // vae.latent_px, width // vae.latent_px)
                states = torch.zeros(samples, *model.states_of(height, width), dtype=dtype, requires_grad=True)
                passed = points, torch.zeros(samples), states  # [B, C, h, w], [B], [B, Q, caption channels]
            stage = model.cut_dit(place, pp)
            stage.split(group)
            with_gradients(stage)
            world.start()
            out = stage(passed, points.shape)
            kept, peak = sum(world.kept().values()), max(world.peaks.values(), default=0)
            after = () if stage.is_last else out
            outputs = [x for x in after or (out,) if x.requires_grad]
            torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])
            places.append(
                units(stage, stage.blocks)
                | {"kept": kept, "peak": peak, "reduced": sum(world.traffic.bytes.values())}
                | {"flops": [world.flops_of["rest", phase] for phase in ("forward", "backward")]}
                | {"exchanged": sum(x.nbytes for x in (*(passed if place else ()), *after))}
            )
            passed = tuple(x.detach().requires_grad_() for x in after)
        return {"places": places, "points": points.nbytes, "states": states.nbytes}
    finally:
        dist.destroy_process_group()


def measure(folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    """Measure one item of a request, of backbones whose config.json files are in `folder`; see `wemmu.planning.ask`."""
    run = StageRun.model_validate(item["run"])
    here = {kind: folder / kind for kind in run.backbones.directories(run.recipe.backbones)}
    run = run.model_copy(update={"backbones": run.backbones.model_copy(update=here)})
    world = Observed()
    with fake_world(world):
        match item["kind"]:
            case "slices":
                return slices(world, run, item["shape"], item["tp"], item["pp"])
            case "parameters":
                model, _ = make_model(run)
                add_encoders(model, run, folder)
                return parameters(model, run)
            case "step":
                return step(world, run, item["shape"])
        raise AssertionError(item["kind"])


def main() -> None:
    """Answer the request on standard input, on several cores; the answers come in the order of its items."""
    request, lines = json.load(sys.stdin), sys.stdout
    # Keeps prints of libraries out of the answer.
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    workers = min(len(request["items"]), os.cpu_count() or 1, WORKERS)
    with written(request["configs"]) as folder:
        for kind in request["configs"].keys() & KNOWN.keys():
            # Imported once, before there are workers.
            class_of(folder / kind, kind)
        with get_context("fork").Pool(workers) as pool:
            for answer in pool.imap(partial(_answer, folder), request["items"]):
                print(json.dumps(answer), file=lines, flush=True)


def _answer(folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    try:
        return measure(folder, item)
    except ValueError as error:
        return {"refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"the model cannot be measured: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
