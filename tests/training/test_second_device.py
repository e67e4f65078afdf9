"""What is made beside a weight lives where the weight lives: training on a device that is not the CPU, without one."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from tests.models.elsewhere import ELSEWHERE, Elsewhere, twin
from tests.models.on_disk import make_backbones
from tests.models.world import micro_batches, random_images
from tests.parallel.cases import ALL, EDIT, GLOBAL_BATCH, MULTI, T2I, Case, Outcome, RossCase, single
from tests.training import test_uae_paths as uae_paths
from wemmu.backbones.full_precision import Made
from wemmu.config.schema import Backbones, Sampling
from wemmu.config.task import Task
from wemmu.parallel import single as single_engine
from wemmu.parallel.single import SingleEngine
from wemmu.prompts import PromptEncoder
from wemmu.recipes.ross.answers import Answerer
from wemmu.recipes.wemmu.build import sources as sources_of
from wemmu.sampling.request import GenerationRequest
from wemmu.sampling.sampler import Sampler
from wemmu.timesteps import alpha_bar
from wemmu.training.start import fill_from

CASES = {
    "contrastive": Case(trains=ALL[:3], kind="contrastive", tasks=(T2I,), noise="device"),
    "flow in bfloat16, with an average": Case(tasks=(MULTI,), dtype="bfloat16", ema=0.9, noise="device"),
    "learnable queries": Case(
        trains=("pathway", "position_mlp", "queries"), design="learnable_fixed", vae_branch=False, noise="device"
    ),
    "ross": RossCase(noise="device"),
    "ross, regression": RossCase(head={"kind": "regressor"}),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    return make_backbones(tmp_path_factory.mktemp("small"), layers=2)


@pytest.fixture(scope="module")
def encoder(backbones: Backbones) -> PromptEncoder:
    return PromptEncoder(backbones.vlm)


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """What is remembered between calls must not be of another test's device."""
    alpha_bar.cache_clear()
    yield
    alpha_bar.cache_clear()


def moved(case: Case, model):
    model = model.to(ELSEWHERE)
    if isinstance(case, RossCase):
        # Parameters that are replaced, as those of other tensor classes are, are no longer shared.
        model.vlm.tie_weights()
    return model


@pytest.mark.parametrize(
    ("name", "offload"), [*((name, ()) for name in CASES), ("flow in bfloat16, with an average", ("vlm", "vae"))]
)
def test_a_step_mixes_no_devices_and_computes_what_it_does_on_the_cpu(
    backbones: Backbones, encoder: PromptEncoder, name: str, offload: tuple[str, ...]
):
    case, here = CASES[name], Outcome()
    model = case.model(backbones)
    for part in offload:
        model.get_submodule(part).offloaded = True
    there = single(case, backbones)
    alpha_bar.cache_clear()
    with Elsewhere():
        model = moved(case, model)
        engine = SingleEngine(model, case.loss(model), case.run)
        # As a checkpoint is loaded: before the first step.
        engine.state()
        engine.on_restore(0)
        for step, task in enumerate(case.tasks):
            ids = [100 * step + i for i in range(GLOBAL_BATCH)]
            batches = [batch.to(ELSEWHERE) for batch in micro_batches(encoder, ids, task, 0, 1, 1)]
            (losses,) = engine.accumulate(batches, step)
            here.losses.append(dict(zip(ids, twin(losses.values).tolist(), strict=True)))
            here.norms.append(engine.step(1.0))
        assert_beside(engine)
        homes = {name: {p.device.type for p in part.parameters()} for name, part in model.named_children()}
        assert all(homes[part] == {"cpu" if part in offload else ELSEWHERE.type} for part in homes if homes[part])
    for mine, reference in zip(here.losses, there.losses, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4)
    assert here.norms == pytest.approx(there.norms, rel=1e-4)


def assert_beside(engine: SingleEngine) -> None:
    """Every tensor of the state is on its weight's device; fused kernels insist, and their fakes do not look."""
    optimizer = engine._adamw._optimizer
    for weight, state in optimizer.state.items():
        assert weight.device == ELSEWHERE
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                assert tensor.device == weight.device, name
    state = engine.state()
    for part in (state.weights, state.exp_avg, state.exp_avg_sq, *([state.ema] if state.ema else [])):
        assert {tensor.device for tensor in part.values()} == {ELSEWHERE}


def test_weights_of_files_and_averages_that_begin_land_where_the_weights_are(backbones: Backbones):
    case = CASES["flow in bfloat16, with an average"]
    model = case.model(backbones)
    # Files are read before, for safetensors hands over memory, which a fake tensor has not.
    stored = sources_of(backbones, case.run.recipe.bridge, 0, model)
    sources = {name: Made(source.read(())) for name, source in stored.items()}
    with Elsewhere():
        model = moved(case, model)
        engine = SingleEngine(model, case.loss(model), case.run)
        state = engine.state()
        fill_from(sources, state.weights)
        state.begin_average()
        engine.on_restore(0)
        assert_beside(engine)
    for name, weight in state.weights.items():
        assert torch.equal(twin(weight), sources[name].tensor), name
        assert torch.equal(twin(state.ema[name]), sources[name].tensor), name


def test_images_and_answers_are_drawn_there(backbones: Backbones, encoder: PromptEncoder):
    generates, answers = CASES["flow in bfloat16, with an average"], CASES["ross"]
    asked = random_images(0, 1, 1, 3, 32, 32)
    request = GenerationRequest(EDIT, ["a red circle"], asked, (32, 32), torch.tensor([1]))
    sampling, there = Sampling(steps=2), []
    for device in (torch.device("cpu"), ELSEWHERE):
        drawing, speaking = (case.model(backbones).eval() for case in (generates, answers))
        with nullcontext() if device.type == "cpu" else Elsewhere():
            if device == ELSEWHERE:
                drawing, speaking = moved(generates, drawing), moved(answers, speaking)
            drawn = Sampler(drawing, encoder, 4.0, device=device)(request, sampling)
            answerer, question = Answerer(speaking, encoder, device), replace(request, texts=["what?"])
            restored, said = answerer.restored(question, 2, 0), answerer.answers(question, limit=3)
        assert drawn.device == restored.device == device
        there.append((twin(drawn), twin(restored), said))
    for mine, reference in zip(*there, strict=True):
        assert mine == reference if isinstance(mine, list) else torch.equal(mine, reference)


class Waiting(Elsewhere):
    """Notes each operator for which the host of a GPU would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor) and x.device == ELSEWHERE]
        masks = func in (aten.index.Tensor, aten.index_put_.default) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        # The backward passes of casts name the device that C++ believes in.
        backward = torch._C._current_graph_task_id() != -1
        goes = (kwargs or {}).get("device") if not backward and func is aten._to_copy.default else None
        to_host = there and goes == torch.device("cpu")
        # From memory that is not pinned: behind all that the device has still to do.
        from_host = not there and goes == ELSEWHERE and not (kwargs or {}).get("non_blocking")
        if from_host or (there and (func in WAITS or masks or to_host)):
            self.waits.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


aten = torch.ops.aten
SCALAR = aten._local_scalar_dense.default
WAITS = {SCALAR, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.bincount.default}


@pytest.mark.parametrize(
    ("name", "task", "waits"),
    [
        ("contrastive", T2I, []),
        ("flow in bfloat16, with an average", MULTI, []),
        ("learnable queries", EDIT, []),
        # How many tokens have a label.
        ("ross", Task.UNDERSTANDING, [aten.nonzero.default]),
        ("ross, regression", Task.UNDERSTANDING, [aten.nonzero.default]),
    ],
)
def test_a_step_does_not_wait_for_the_device(
    backbones: Backbones,
    encoder: PromptEncoder,
    name: str,
    task: Task,
    waits: list[Any],
    monkeypatch: pytest.MonkeyPatch,
):
    """From padded words and, where the task has some, images of a grid that an earlier step had."""
    # The norm is read in the next step; see `wemmu.parallel.reading`.
    monkeypatch.setattr(single_engine, "on_its_way", lambda norm: norm)
    case = replace(CASES[name], tasks=(task,), noise="device")
    model = case.model(backbones)
    with Waiting() as world:
        model = moved(case, model)
        engine = SingleEngine(model, case.loss(model), case.run)
        engine.state()
        (batch,) = micro_batches(encoder, list(range(GLOBAL_BATCH)), task, 0, 1, 1)
        assert batch.prompts.padded
        batch = batch.to(ELSEWHERE)
        for step in range(2):
            world.waits.clear()
            engine.accumulate([batch], step)
            engine.step(1.0)
    assert world.waits == [str(operator) for operator in waits]


# The objective, what learns, and the waits of a step.
UAE_STEPS = {
    # How many tokens have a label.
    "captions": ("{kind: caption}", "[llm]", [aten.nonzero.default]),
    "rewards": (
        "{kind: unified_grpo, group: 3, temperature: 2.0, updates: 2, beta: 0.1}", "[llm]", [aten.nonzero.default]
    ),
    "paths": ("{kind: flow_grpo, group: 3, temperature: 2.0, updates: 2, beta: 0.1}", "[dit]", []),
    # Whether images and reconstructions are in [0, 1]: two waits, for two numbers each.
    "cold start": ("{kind: cold_start, temperature: 2.0, last: 2}", "[llm, dit]", [SCALAR] * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", UAE_STEPS)
def test_what_a_step_of_uae_waits_for(name: str, monkeypatch: pytest.MonkeyPatch):
    """The second step on a rollout or, where each step has its own, of a size that an earlier one had."""
    monkeypatch.setattr(single_engine, "on_its_way", lambda norm: norm)
    objective, trains, waits = UAE_STEPS[name]
    made = uae_paths.make(
        f"stages.reward.objective={objective}", "recipe.cond_encoder=policy", "kernels.noise=device", trains=trains
    )
    (batch,) = uae_paths.batches(made, 2)
    if name == "captions":
        said = [made.encoder.answer_ids(words) for words in ("a red circle above a blue square", "a cross")]
        prompts, labels = made.policy.captioned(uae_paths.ASKED, batch.images, said)
        batch = replace(batch, prompts=prompts, labels=labels)
    with Waiting() as world:
        made.model.to(ELSEWHERE)
        made.model.vlm.tie_weights()
        engine = SingleEngine(made.model, made.loss, made._run)
        engine.state()
        batch = batch.to(ELSEWHERE)
        for step in range(2):
            prepared = made.prepare([batch], step)
            # A rollout's own: what was sampled is read on the host.
            world.waits.clear()
            engine.accumulate(prepared.batches, step)
            engine.step(1.0)
    assert world.waits == [str(operator) for operator in waits]
