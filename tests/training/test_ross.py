"""Reconstructive tuning: whom its loss teaches, what it is made of, and a run of it."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.models.world import make_questions, make_ross, patches_of
from tests.parallel.cases import RossCase
from wemmu.backbones.versions import image_kinds
from wemmu.config.base import leaves
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.jsonlines import read_lines
from wemmu.objectives.reconstruction import alpha_bar
from wemmu.parallel.single import SingleEngine
from wemmu.prompts import PromptEncoder
from wemmu.recipes.ross.answers import Answerer
from wemmu.recipes.ross.build import build_ross
from wemmu.recipes.ross.config import Ross as RossConfig
from wemmu.recipes.ross.loss import ReconstructiveLoss
from wemmu.recipes.ross.model import Ross
from wemmu.recipes.ross.recipe import RossRecipe
from wemmu.sampling.request import GenerationRequest
from wemmu.shapes.language import DESCRIBE, question
from wemmu.shapes.render import render
from wemmu.shapes.scene import random_scene
from wemmu.training.resume import with_defaults
from wemmu.types import IGNORE_INDEX, Batch

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "assets" / "shapes"
HEADS = {"denoiser": RossCase(), "regressor": RossCase(head={"kind": "regressor"})}
PARTS = {
    "tower": "vlm.model.visual.blocks.",
    "projector": "vlm.model.visual.merger.",
    "llm": "vlm.model.language_model.layers.",
    "autoencoder": "vae.",
    "head": "head.",
}


def request_of(texts: list[str], images: torch.Tensor, sample_ids: torch.Tensor) -> GenerationRequest:
    return GenerationRequest(Task.UNDERSTANDING, texts, images, tuple(images.shape[-2:]), sample_ids)


def moved(model: Ross) -> set[str]:
    """The parts that have a gradient other than zero."""
    felt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {part for part, prefix in PARTS.items() if any(name.startswith(prefix) for name in felt)}


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_reconstruction_alone_teaches_all_that_is_trained_and_nothing_else(backbones, encoder, case: RossCase) -> None:
    model = case.model(backbones)
    loss = case.loss(model)(make_questions(encoder, [0, 1]), step=0)
    loss.parts["loss/visual"].sum().backward()
    assert moved(model) == {"projector", "llm", "head"}
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)
    # The language-model head is no part of it, but where it is tied it is the embedding.
    assert model.vlm.lm_head.weight is model.language_model.embed_tokens.weight


def test_in_the_first_stage_it_goes_through_a_frozen_language_model(backbones, encoder) -> None:
    model = RossCase(trains=("projector", "head")).model(backbones)
    RossCase().loss(model)(make_questions(encoder, [0, 1]), step=0).parts["loss/visual"].sum().backward()
    assert moved(model) == {"projector", "head"}


def test_the_loss_is_that_of_the_words_and_a_weight_times_that_of_the_images(backbones, encoder) -> None:
    case, batch = RossCase(), make_questions(encoder, [0, 1, 2, 3])
    model = case.model(backbones)
    with torch.no_grad():
        losses = case.loss(model)(batch, step=0)
        text, visual = losses.parts["loss/text"], losses.parts["loss/visual"]
        assert torch.allclose(losses.values, text + case.run.stage.objective.weight * visual)
        logits = model.logits(model.states(batch.prompts, batch.images).text)
        for row in range(4):
            mean = F.cross_entropy(logits[row], batch.labels[row], ignore_index=IGNORE_INDEX)
            assert torch.allclose(text[row], mean, rtol=1e-5)


def test_without_weight_words_are_taught_as_if_there_were_no_head(backbones, encoder) -> None:
    case, batch = RossCase(), make_questions(encoder, [0, 1])
    gradients = []
    for weight in (0.0, None):
        model = case.model(backbones)
        run = case.run
        if weight is not None:
            run = run.changed({"stage.objective.weight": weight})
        losses = ReconstructiveLoss(model, run)(batch, step=0)
        (losses.values if weight is not None else losses.parts["loss/text"]).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if n.startswith("vlm.") and p.requires_grad})
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


@torch.no_grad()
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_a_sample_is_worth_the_same_in_any_batch(backbones, encoder, case: RossCase) -> None:
    loss = case.loss(case.model(backbones))
    together = loss(make_questions(encoder, [5, 6, 7]), step=3).values
    for row, one in enumerate((5, 6, 7)):
        assert torch.allclose(loss(make_questions(encoder, [one]), step=3).values, together[row], rtol=1e-5)
    assert torch.equal(loss(make_questions(encoder, [5, 6, 7]), step=3).values, together)
    noisy = case.head["kind"] == "denoiser"
    assert torch.equal(loss(make_questions(encoder, [5, 6, 7]), step=4).values, together) != noisy


@torch.no_grad()
def test_questions_without_a_image_are_of_words_alone(backbones, encoder) -> None:
    asked = make_questions(encoder, [0, 1])
    prompts, wanted = encoder.answered(["say a", "say b"], ["a red circle", "yes"], [[], []])
    batch: Batch = replace(asked, prompts=prompts, labels=wanted, images=asked.images[:, :0])
    losses = RossCase().loss(RossCase().model(backbones))(batch, step=0)
    # No reconstruction of nothing enters the mean that the record shows.
    assert torch.equal(losses.values, losses.parts["loss/text"])
    assert losses.parts.keys() == {"loss/text"}


def test_a_mean_over_tokens_is_over_those_of_the_whole_step_however_it_is_divided(backbones, encoder) -> None:
    """And with 3 and 1 samples in its micro-batches; losses, and gradients."""
    case = RossCase()
    model, run = case.model(backbones), case.run.changed({"stage.objective.answers": "token"})
    made, loss = SimpleNamespace(_run=run), ReconstructiveLoss(model, run)
    whole = make_questions(encoder, [0, 1, 2, 3])
    logits = model.logits(model.states(whole.prompts, whole.images).text)
    mean = F.cross_entropy(logits.flatten(0, 1), whole.labels.flatten(), ignore_index=IGNORE_INDEX)
    for ids in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]):
        batches = RossRecipe.prepare(made, [make_questions(encoder, part) for part in ids], step=0).batches
        text = sum(loss(batch, step=0).parts["loss/text"].sum() for batch in batches) / run.stage.global_batch
        torch.testing.assert_close(text, mean, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(text, model.language_model.norm.weight)
        (theirs,) = torch.autograd.grad(mean, model.language_model.norm.weight, retain_graph=True)
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-7)
    lengths = (whole.labels != IGNORE_INDEX).sum(1)
    assert len(set(lengths.tolist())) > 1
    assert not torch.isclose(mean, loss(whole, step=0).parts["loss/text"].mean(), rtol=1e-3)


def test_the_gradient_of_the_joint_loss_is_the_sum_of_both(backbones, encoder) -> None:
    case, batch, found = RossCase(), make_questions(encoder, [0, 1]), []
    weight = case.run.stage.objective.weight
    for choose in (
        lambda one: one.values,
        lambda one: one.parts["loss/text"],
        lambda one: weight * one.parts["loss/visual"],
    ):
        model = case.model(backbones)
        choose(case.loss(model)(batch, step=0)).sum().backward()
        named = model.named_parameters()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name] + found[2][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_what_a_stage_does_not_train_stays_bit_by_bit(backbones, encoder, stage: str) -> None:
    """In the first stage the reconstruction alone moves the projector, through a language model that stays."""
    trains = {"align": ("projector", "head"), "tune": RossCase.trains}[stage]
    case = RossCase(trains=trains)
    model = case.model(backbones)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = make_questions(encoder, [0, 1, 2, 3])
    unlabelled = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
    engine = SingleEngine(model, case.loss(model), case.run.changed({"stage.global_batch": 4}))
    for step in range(2):
        engine.accumulate([unlabelled], step)
        engine.step(1.0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = {part for part, prefix in PARTS.items() if any(name.startswith(prefix) for name in changed)}
    assert parts == {"projector", "head"} | ({"llm"} if stage == "tune" else set())


def test_a_head_of_a_bfloat16_model_computes_in_float32(backbones, encoder) -> None:
    batch = make_questions(encoder, [0, 1])
    model = RossCase(dtype="bfloat16").model(backbones)
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    losses = RossCase().loss(model)(batch, step=0)
    assert losses.values.dtype == torch.float32
    losses.values.sum().backward()
    assert moved(model) == {"projector", "llm", "head"}


@torch.no_grad()
def test_answers_are_those_of_the_libraries_own_generation(shipped) -> None:
    """Of the shipped VLM, to which positions matter; questions of several lengths in one batch."""
    model, encoder = shipped
    rng = random.Random(0)
    scenes = [random_scene(rng, "test") for _ in range(6)]
    texts = [DESCRIBE if i % 2 else question(scene, rng)[0] for i, scene in enumerate(scenes)]
    images = torch.stack([torch.from_numpy(np.array(render(scene, 64))).permute(2, 0, 1) for scene in scenes])
    answers = Answerer(model, encoder).answers(request_of(texts, images[:, None], torch.arange(6)), limit=24)
    assert len({len(answer) for answer in answers}) > 1
    for text, image, answer in zip(texts, images, answers, strict=True):
        ids = torch.tensor([encoder.token_ids(text, [(4, 4)])])
        made = model.vlm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches_of(model, image),
            image_grid_thw=torch.tensor([[1, 4 * model.merge, 4 * model.merge]]),
            **image_kinds(model.vlm, ids),
            max_new_tokens=24,
            do_sample=False,
        )
        assert answer == encoder.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_pixels_are_learnt_and_restored_without_an_autoencoder(backbones, encoder) -> None:
    config = RossConfig(target="pixels", head={"kind": "linear"})
    model, reports = build_ross(Backbones(vlm=backbones.vlm), config, seed=0)
    assert reports.keys() == {"vlm"}
    batch = make_questions(encoder, [0, 1])
    loss = ReconstructiveLoss(model, RossCase(head={"kind": "linear"}).run)(batch, step=0)
    assert loss.parts["loss/visual"].isfinite().all()
    asked = request_of(["", ""], batch.images, torch.arange(2))
    assert Answerer(model, encoder).restored(asked, steps=1, seed=0).shape == batch.images.shape


@pytest.fixture(scope="module")
def shipped() -> tuple[Ross, PromptEncoder]:
    """The VLM that is shipped, whose answers are sentences."""
    backbones = Backbones(vlm=SHIPPED / "vlm", sana=SHIPPED / "sana")
    return make_ross(backbones).eval(), PromptEncoder(backbones.vlm)


def test_what_is_drawn_does_not_depend_on_the_mode_the_trainer_left(shipped) -> None:
    """With recomputation, layers of Hugging Face in training mode take no cache; and with dropout."""
    model, encoder = shipped
    model.checkpoint_activations()
    for layer in model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    image = torch.from_numpy(np.array(render(random_scene(random.Random(1), "test"), 64))).permute(2, 0, 1)
    asked, answerer = request_of([DESCRIBE], image[None, None], torch.arange(1)), Answerer(model, encoder)
    answers, restored = answerer.answers(asked, limit=12), answerer.restored(asked, steps=2, seed=0)
    model.train()
    # What a trainer left in eval mode stays there.
    model.head.blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert answerer.answers(asked, limit=12) == answers
    assert torch.equal(answerer.restored(asked, steps=2, seed=0), restored)
    assert [module.training for module in model.modules()] == before


@torch.no_grad()
@pytest.mark.parametrize("head", ["denoiser", "regressor"])
def test_a_head_that_knows_the_target_restores_the_image(backbones, encoder, head: str) -> None:
    """In pixels, where nothing but the head stands between target and image."""
    config = {"kind": head} if head == "regressor" else {**HEADS["denoiser"].head}
    model = make_ross(backbones, target="pixels", head=config)
    images = make_questions(encoder, [0, 1]).images
    target = model.target(images.flatten(0, 1))
    model.head.forward = Oracle(target) if head == "denoiser" else lambda states, grid: target
    restored = Answerer(model, encoder).restored(request_of(["", ""], images, torch.arange(2)), steps=20, seed=0)
    assert torch.allclose(restored[:, 0], images[:, 0] / 127.5 - 1, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 20, 50, 333, 1000])
def test_a_head_that_errs_a_little_restores_the_image_and_meets_no_noise_unlike_that_of_training(
    backbones, encoder, steps: int
) -> None:
    model = make_ross(backbones, target="pixels", head=HEADS["denoiser"].head)
    images = make_questions(encoder, [0, 1]).images
    target = model.target(images.flatten(0, 1))
    model.head.forward = oracle = Oracle(target, off=0.02)
    restored = Answerer(model, encoder).restored(request_of(["", ""], images, torch.arange(2)), steps=steps, seed=0)
    assert oracle.unlike < 1.1
    error = (restored[:, 0] - (images[:, 0] / 127.5 - 1)).square().mean().sqrt()
    # One step leaves all that the head errs where there is almost no signal; four, what it errs half way.
    assert error < {1: 0.7, 4: 0.02}.get(steps, 0.002)


class Oracle:
    """eps = (z_t - sqrt(abar_t) z_0) / sqrt(1 - abar_t), and `off` times noise, as heads are never exact.

    Such a head also mends what its own errors did to z_t; real ones know no z_t but those that they were trained on.
    `unlike`: the largest root mean square of the noise in a z_t that it was asked about, where training has 1.
    """

    def __init__(self, z_0: torch.Tensor, off: float = 0.0):
        self.z_0, self.off, self.unlike = z_0, off, 0.0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        share = alpha_bar(1000)[t].float().reshape(-1, 1, 1, 1)
        eps = (z_t - share.sqrt() * self.z_0) / (1 - share).sqrt()
        self.unlike = max(self.unlike, float(eps.square().mean().sqrt()))
        return eps + self.off * torch.randn(eps.shape, generator=self.generator)


# In bfloat16, as at full size; what is trained and saved is float32 nonetheless.
FEW = {
    "backbones.dtype": "bfloat16",
    "data.prepare.sources.0.samples": "{understanding: 48}",
    "evaluation.prompts": "4",
    "sampling.steps": "2",
    "reconstruction.head.width": "32",
    "reconstruction.head.repeats": "1",
    "logging.every": "1",
    "logging.wandb": "disabled",
    "threads": "1",
    "stages.*.steps": "3",
    "stages.*.global_batch": "8",
    "stages.*.optimizer.warmup": "0",
    "stages.*.optimizer.decay": "0",
}


@pytest.mark.slow
def test_the_example_runs_from_shards_to_a_vlm_that_transformers_loads(tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = FEW | {"data.shards": str(tmp_path / "shards")}
    overrides = [word for field, value in few.items() for word in ("--set", f"{field}={value}")]
    command = [sys.executable, "-m", "launcher", "run", "configs/shapes/ross.yaml", "--out", str(run), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "already finished" not in ran.stdout

    losses = [line for line in read_lines(run / "tune" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3]
    assert losses[0]["head_lr"] / losses[0]["lr"] == pytest.approx(1e-3 / 3e-4)
    for line in losses:
        assert line["loss"] == pytest.approx(line["loss/text"] + line["loss/visual"], rel=1e-5)
    scores = json.loads((run / "tune" / "evaluation.json").read_text())["tasks"]["understanding"]["test"]
    assert scores["measures"].keys() == {"right", "restored"}
    assert scores["by"].keys() == {"description", "question"}

    shipped = Qwen2_5_VLForConditionalGeneration.from_pretrained(REPOSITORY / "assets/shapes/vlm")
    tuned = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "export")
    changed = {name for name, p in tuned.state_dict().items() if not torch.equal(p, shipped.state_dict()[name])}
    assert changed
    assert all(name.startswith(("model.language_model.", "model.visual.merger.", "lm_head.")) for name in changed)
    # The snippet of its card answers as it stands.
    card = (run / "export" / "README.md").read_text()
    assert "tuned by the recipe `ross`" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    shutil.copy(REPOSITORY / "assets/shapes/examples/first.png", run / "export" / "image.png")
    answered = subprocess.run([sys.executable, "-c", snippet], cwd=run / "export", capture_output=True, text=True)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already finished") >= 5


def test_fields_that_came_later_are_no_change_of_a_resumed_run():
    """What an earlier version recorded of a run of pixels and an MLP."""
    was = {"seed": 0, "recipe.kind": "ross", "recipe.target": "pixels", "recipe.layer": "last"}
    was |= {"recipe.head.kind": "regressor", "recipe.head.depth": 2, "recipe.head.metric": "mse"}
    recipe = RossConfig.model_validate({"target": {"kind": "pixels"}, "head": {"kind": "mlp"}})
    assert with_defaults(was, "recipe", recipe) == {"seed": 0} | dict(leaves(recipe.model_dump(mode="json"), "recipe"))
    other = RossConfig.model_validate({"target": {"kind": "pixels", "norm": "patch"}, "head": {"kind": "mlp"}})
    now = dict(leaves(other.model_dump(mode="json"), "recipe"))
    read = with_defaults(was, "recipe", other)
    assert {name for name, value in now.items() if read.get(name) != value} == {"recipe.target.norm"}
    assert with_defaults(was | {"recipe.head.kind": "gone"}, "recipe", recipe) == was | {"recipe.head.kind": "gone"}
