"""The README.md of an export: what it is, how it was trained, what it scored, how to use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from wemmu.checkpoint.manifest import Manifest
from wemmu.config import StageRun, load_stages
from wemmu.config.benchmarks import RESULTS
from wemmu.config.exported import ARGUMENTS
from wemmu.jsonlines import read_lines
from wemmu.recipes.wemmu.config import WeMMU
from wemmu.shapes.vocabulary import WORLD

CARD = "README.md"
_CARD = Template("""\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [wemmu, image-editing, image-to-image]
$license
---
# $name

A WeMMU model: a frozen vision-language model (`vlm`) and a diffusion transformer (`transformer`, `vae`) joined by a
bridge (`bridge`) of $queries query tokens. It draws from text, edits an image by an instruction, and
combines several images, at $resolution px.

## Use
With the `wemmu` package installed:
```python
$usage
```
`pipe("make the circle green", image=image)` edits, `image=[first, second]` combines; `seed=` makes it repeatable.
Without importing wemmu, diffusers must be allowed to run the two lines of `pipeline.py`:
```python
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(directory, custom_pipeline=directory, trust_remote_code=True$given)
```
`wemmu ui DIRECTORY` opens a page in the browser.

| default of a call | value |
|---|---|
$settings

$record""")
_VLM_CARD = Template("""\
---
library_name: transformers
pipeline_tag: image-text-to-text
$license
---
# $name

A vision-language model: $vlm, tuned by the recipe `$recipe`. It loads wherever $vlm does.

## Use
```python
$usage
```

$record""")
_RECORD = Template("""\
## Licence
$terms

## Training
From step $step of $stage, seed $seed, on $samples samples in all stages; commit $commit.

| stage | px | steps | batch | trains | objective | tasks |
|---|---|---|---|---|---|---|
$stages

## Scores
$scores

## Parity with the training model
```
$parity
```
""")
_USAGE = """\
from wemmu.pipeline import WeMMUPipeline
${vlm}directory = "."  # this directory
pipe = WeMMUPipeline.from_pretrained(directory$given)
pipe("a red circle at the top left and a blue square at the bottom right").images[0].save("image.png")"""
# Between the lines of `_USAGE`.
_LOAD_VLM = """\
from transformers import AutoModelForImageTextToText
# The VLM it was trained beside: $vlm, whose weight files have the SHA-256
# $sha256
vlm = AutoModelForImageTextToText.from_pretrained("$vlm")
"""
_VLM_USAGE = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
directory = "."  # this directory
vlm, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
content = [{"type": "image", "image": Image.open("image.png")}, {"type": "text", "text": $question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = vlm.generate(**inputs, max_new_tokens=128)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])"""


_OWN_TERMS = "Apache-2.0: all weights, the backbones' included, come from the wemmu repository."
_TERMS = """\
The weights contain and derive from $names. The licences of these models apply; check them before you publish this
directory, and name them above as `license` and `base_model`."""


def pipeline_card(run: StageRun, folder: Path, manifest: Manifest, parity: list[str], without_vlm: bool) -> str:
    """Return the card of the checkpoint with `manifest` of the stage `run` in `folder`, exported as a pipeline."""
    load, given = (_LOAD_VLM, ", vlm=vlm") if without_vlm else ("", "")
    vlm = Template(load).substitute(vlm=run.backbones.vlm.name, sha256=manifest.frozen["vlm"])
    assert isinstance(run.recipe, WeMMU)
    settings = {"height, width": f"{manifest.resolution} px"} | {
        argument: getattr(run.sampling, field) for field, argument in ARGUMENTS.items()
    }
    assert run.backbones.dit is not None, "the recipe wemmu has one"
    assert run.backbones.vae is not None, "the recipe wemmu has one"
    # The DiT and the autoencoder lie in one directory, which has the model's name.
    names = {"VLM": run.backbones.vlm, "DiT": run.backbones.dit.parent, "autoencoder": run.backbones.vae.parent}
    return _CARD.substitute(
        _shared(run, folder, manifest, parity, names),
        queries=run.recipe.bridge.queries.design.replace("_", " "),
        resolution=manifest.resolution,
        given=given,
        usage=Template(_USAGE).substitute(vlm=vlm, given=given),
        settings="\n".join(f"| `{name}` | {value} |" for name, value in settings.items()),
    )


def vlm_card(run: StageRun, folder: Path, manifest: Manifest, parity: list[str], question: str) -> str:
    """Return the card of a tuned VLM, as `pipeline_card`. question: what its recipe asks about an image."""
    return _VLM_CARD.substitute(
        _shared(run, folder, manifest, parity, {"VLM": run.backbones.vlm}),
        vlm=run.backbones.vlm.name,
        recipe=run.recipe.kind,
        usage=Template(_VLM_USAGE).substitute(question=json.dumps(question)),
    )


def _shared(
    run: StageRun, folder: Path, manifest: Manifest, parity: list[str], backbones: Mapping[str, Path]
) -> dict[str, str]:
    """What both cards say. backbones: kind -> directory with the model's name."""
    own, stages = run.world == WORLD, stages_until(run, folder)
    names = ", ".join(f"the {kind} of {directory.name}" for kind, directory in backbones.items())
    record = _RECORD.substitute(
        terms=_OWN_TERMS if own else Template(_TERMS).substitute(names=names),
        step=manifest.step,
        stage=manifest.stage,
        seed=manifest.seed,
        samples=f"{sum(each.stage.steps * each.stage.global_batch for each in stages):,}",
        commit=trained_commit(folder),
        stages="\n".join(_stage_row(stage) for stage in stages),
        scores=_scores(folder / RESULTS, manifest),
        parity="\n".join(parity),
    )
    license_ = "license: apache-2.0" if own else "license: other\nlicense_name: of-the-backbones"
    return {"name": run.name, "license": license_, "record": record}


def trained_commit(folder: Path) -> str:
    """Return the commit that last trained the stage."""
    lines = read_lines(folder / "environment.jsonl")
    # A folder without git, such as a downloaded archive, records no commit.
    return lines[-1].get("commit") or "unknown" if lines else "unknown"


def stages_until(run: StageRun, folder: Path) -> list[StageRun]:
    """Return the stages of the same run up to this one, in their order."""
    beside = [other for _, other in load_stages(folder.resolve().parent)]
    return [*(other for other in beside if other.name == run.name and other.stage_index < run.stage_index), run]


def _stage_row(run: StageRun) -> str:
    stage = run.stage
    numbers = f"{stage.name} | {stage.resolution} | {stage.steps} | {stage.global_batch}"
    tasks = ", ".join(f"{task} {share:g}" for task, share in stage.mixture.items())
    return f"| {numbers} | {', '.join(stage.trains)} | {stage.objective.kind} | {tasks} |"


def _scores(file: Path, manifest: Manifest) -> str:
    """A table of the evaluation's shares, if it is there and of this very checkpoint."""
    if not file.is_file():
        return "This checkpoint was not evaluated."
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if results["checkpoint"]["step"] != manifest.step:
        return f"Only step {results['checkpoint']['step']} of this stage was evaluated."
    rows = [
        f"| {task} | {split} | {measure} | {share['share']:.3f} | {share['count']} |"
        for task, splits in results["tasks"].items()
        for split, summary in splits.items()
        for measure, share in summary["measures"].items()
    ]
    return "\n".join(["| task | split | measure | share | requests |", "|---|---|---|---|---|", *rows])
