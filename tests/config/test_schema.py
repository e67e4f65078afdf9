"""What the schema refuses, and the numbers it derives."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.curricula import tree, write
from wemmu.config import ConfigError, load_curriculum, load_stage
from wemmu.config.next_resolution import NextResolution
from wemmu.config.recipe import RecipeConfig
from wemmu.config.registry import RECIPES
from wemmu.config.schema import Curriculum, Memory
from wemmu.config.stage import Optimizer
from wemmu.config.upgrade import _offloaded, upgraded_file
from wemmu.recipes.ross.config import Ross
from wemmu.recipes.wemmu.config import Bridge, WeMMU

Bend = Callable[[dict[str, Any]], None]


def put(*path: Any) -> Bend:
    """Set the value `path[-1]` at the place that the rest of `path` names."""

    def bend(content: dict[str, Any]) -> None:
        for key in path[:-2]:
            content = content.setdefault(key, {}) if isinstance(content, dict) else content[key]
        content[path[-2]] = path[-1]

    return bend


EXAMPLE = Path(__file__).parents[2] / "configs/shapes/ross.yaml"
LEARNABLE = put("bridge", "queries", {"design": "learnable_fixed"})

RESOLUTIONS = put("stages", 0, "resolution", [32, 48, 64])
PLATEAU = {"every": 10, "window": 2, "min_gain": 0.01, "patience": 2}
ROSS = {
    "name": "align",
    "resolution": 64,
    "steps": 100,
    "global_batch": 16,
    "trains": ["projector", "head"],
    "objective": {"kind": "reconstructive"},
    "optimizer": {"lr": 1.0e-3},
    "mixture": {"understanding": 1.0},
}

REFUSED = {
    "resolutions that do not ascend": (
        [put("stages", 0, "resolution", [64, 32]), put("stages", 0, "next_resolution", {"samples": 16})],
        r"stage first: resolution is one number or several that ascend, got \[64, 32\]",
    ),
    "a resolution twice": (
        [put("stages", 0, "resolution", [64, 64]), put("stages", 0, "next_resolution", {"samples": 16})],
        r"ascend, got \[64, 64\]",
    ),
    "no resolution": ([put("stages", 0, "resolution", [])], r"ascend, got \[\]"),
    "resolutions without a rule": (
        [RESOLUTIONS],
        r"resolutions need next_resolution, e\.g\. \{samples: 1000000\}",
    ),
    "a rule for one resolution": ([put("stages", 0, "next_resolution", {"samples": 16})], "this stage has one"),
    "a rule for another number of resolutions": (
        [RESOLUTIONS, put("stages", 0, "next_resolution", {"samples": [16, 16, 16]})],
        "has 3 numbers for 3 resolutions; valid: one number, or 2",
    ),
    "resolutions that leave the last one nothing": (
        [RESOLUTIONS, put("stages", 0, "next_resolution", {"samples": [800, 793]})],
        r"50 \+ 50 steps of 16, which leaves none of its 100 steps for 64 px",
    ),
    "a plateau without held-out records": (
        [RESOLUTIONS, put("stages", 0, "next_resolution", {"samples": 640, "plateau": PLATEAU})],
        r"next_resolution\.plateau needs held-out records, but data\.validation is 0",
    ),
    "a plateau that cannot be seen in time": (
        [RESOLUTIONS, put("stages", 0, "next_resolution", {"samples": [640, 624], "plateau": PLATEAU})],
        r"cannot end a resolution before \(window \+ patience\) x every = 40 steps, and its samples end one after 39",
    ),
    "noisy queries trained": ([put("stages", 0, "trains", ["pathway", "queries"])], "noisy queries have no parameters"),
    "learnable queries not trained": ([LEARNABLE], "must train the queries of design learnable_fixed"),
    "absent branch trained": ([put("bridge", "vae_branch", False)], r"bridge\.vae_branch is off"),
    "a rate of a module of another recipe": (
        [put("stages", 1, "optimizer", {"lr": 1, "module_lr": {"head": 0.1}})],
        r"stage second: optimizer\.module_lr names head, which the recipe wemmu does not have; valid: vae_branch, ",
    ),
    "dit without its rate": (
        [put("stages", 1, "trains", ["dit"])],
        r"stage second .* optimizer\.module_lr\.dit is needed",
    ),
    "warm-up and decay too long": (
        [put("stages", 0, "optimizer", {"lr": 1, "warmup": 60, "decay": 41})],
        "stage first: warm-up and decay are longer than its 100 steps",
    ),
    "no generation task": (
        [put("stages", 0, "mixture", {"understanding": 1.0})],
        "understanding is not a task of the recipe wemmu; valid tasks: t2i",
    ),
    "module of another objective": (
        [put("stages", 0, "trains", ["pathway", "llm"])],
        "stage first: the recipe wemmu has no llm to train; valid: vae_branch, pathway",
    ),
    "a VLM that is to generate": (
        [put("stages", 0, ROSS | {"mixture": {"t2i": 1.0}})],
        "t2i is not a task of the recipe ross; valid tasks: understanding",
    ),
    "answers beside images": (
        [put("stages", 0, ROSS)],
        "stage second: the recipe ross has no objective flow; valid: reconstructive",
    ),
    "a DiT shared where there is none": (
        [put("stages", [ROSS]), put("parallel", {"engine": "hybrid", "ranks": 2, "tp": 2})],
        "the recipe ross does not run on engine hybrid; valid: single, zero3",
    ),
    "a head that does not divide": (
        [put("stages", [ROSS]), put("recipe", {"head": {"kind": "denoiser", "width": 20, "heads": 3}})],
        "width 20 must be a multiple of 4 and of its 3 heads",
    ),
    "an autoencoder that is not there, in host memory": (
        [
            put("stages", [ROSS]),
            put("recipe", {"kind": "ross", "target": "pixels"}),
            put("backbones", {"vlm": "vlm"}),
            put("memory", "offload", ["vae"]),
        ],
        "memory names vae, but backbones has no vae; remove it",
    ),
    "a target of whole images": (
        [put("stages", [ROSS]), put("recipe", {"kind": "ross", "target": {"kind": "latents", "group": 5000}})],
        r"group: Input should be less than or equal to 16",
    ),
    "latents of the source for a DiT that learns nothing": (
        [put("recipe", {"kind": "wemmu", "bridge": {"source_latents": True}})],
        "no stage trains dit, so its channels for them would stay zero",
    ),
    "reconstruction without the branch that is not there": (
        [
            put("recipe", {"kind": "wemmu", "bridge": {"reconstruct_without_vae": 0.5, "vae_branch": False}}),
            *(put("stages", number, "trains", ["pathway"]) for number in (0, 1)),
        ],
        "reconstruct_without_vae leaves out the VAE branch",
    ),
    "unknown task": ([put("stages", 0, "mixture", {"poetry": 1.0})], "t2i"),
    "empty mixture": ([put("stages", 0, "mixture", {})], "the mixture is empty; valid tasks: t2i"),
    "weight of zero": ([put("stages", 0, "mixture", {"t2i": 0})], "greater than 0"),
    "nothing trained": ([put("stages", 0, "trains", [])], "must train at least one module"),
    "module named twice": ([put("stages", 0, "trains", ["pathway", "pathway"])], "named twice: pathway, pathway"),
    "seed of 65 bits": ([put("seed", 2**64)], "seed: Input should be less than or equal to"),
    "seed of images of 65 bits": (
        [put("sampling", {"seed": 2**64})],
        "sampling.seed: Input should be less than or equal to",
    ),
    "unknown module": ([put("stages", 0, "trains", ["vlm"])], "has no vlm to train; valid: vae_branch, pathway"),
    "stage named twice": ([put("stages", 1, "name", "first")], "stages need distinct names, got: first, first"),
    "no stages": ([put("stages", [])], "stages need distinct names, got: none"),
    "name that is no directory": ([put("stages", 0, "name", "a/b")], "match pattern"),
    "contrast in a batch of one": (
        [put("stages", 0, "objective", {"kind": "contrastive"}), put("stages", 0, "global_batch", 1)],
        "needs another sample in the batch",
    ),
    "a batch that the ranks cannot share": (
        [put("parallel", {"engine": "zero3", "ranks": 3})],
        "stage first: the global batch 16 is not a multiple of the 3 ranks",
    ),
    "several processes of the single engine": (
        [put("parallel", {"ranks": 2})],
        "engine single is one process, but ranks is 2",
    ),
    "degrees of an engine that has none": (
        [put("parallel", {"engine": "zero3", "ranks": 2, "tp": 2})],
        "zero3 has no tensor or pipeline parallelism",
    ),
    "ranks that are no groups": (
        [put("parallel", {"engine": "hybrid", "ranks": 4, "tp": 3})],
        "4 ranks cannot be divided into groups of tp 3 x pp 1",
    ),
    "stages that are no list": ([put("stages", 5)], r"stages: must be a list, e.g. \[\{name: my-name, steps: 64"),
    "a recipe by its name alone": ([put("recipe", "ros")], r"recipe: must be a mapping, e\.g\. \{kind: ross\}"),
    "an objective by its name alone": (
        [put("stages", 0, "objective", "contrastive")],
        r"objective: must be a mapping, e\.g\. \{kind: contrastive\}",
    ),
    "a section that is a number": ([put("data", 5)], r"data: must be a mapping, e\.g\. \{shards: my-shards\} .*got 5"),
    "a section that is a list": ([put("backbones", [])], r"backbones: must be a mapping, e\.g\. \{vlm: my-vlm\}"),
    "a misspelt kind of a source": (
        [put("data", "prepare", {"sources": [{"kind": "foldr", "name": "a"}]})],
        r"sources\.0: unknown kind 'foldr'; did you mean folder\? valid: shapes, webdataset",
    ),
    "a source without its kind": (
        [put("data", "prepare", {"sources": [{"name": "a"}]})],
        r"sources\.0: the field kind is missing; .*valid kinds: shapes, webdataset",
    ),
    "a misspelt kind of an objective": ([put("stages", 0, "objective", {"kind": "flw"})], "did you mean flow"),
    "a misspelt recipe": ([put("recipe", {"kind": "wemu"})], "recipe: unknown kind 'wemu'; did you mean wemmu"),
    "a misspelt task": (
        [put("stages", 0, "mixture", {"t2ii": 1})],
        r"stages\.0\.mixture\.t2ii: unknown value; did you mean t2i\? valid: t2i, [^(]*$",
    ),
    "a misspelt task of a gate": ([put("stages", 0, "gate", {"scores": {"t2ii": 1}})], r"t2ii: .*did you mean t2i\?"),
    "a misspelt module": (
        [put("stages", 0, "trains", ["vae_brnch"])],
        r"has no vae_brnch to train; did you mean vae_branch\? valid: vae_branch, pathway, [^(]*$",
    ),
    "a misspelt module of adapters": ([put("recipe", "lora", {"dti": {}})], r"no adapters for dti; did you mean dit\?"),
    "a misspelt part to quantize": ([put("memory", "quantize", {"vmm": "nf4"})], r"did you mean vlm\? valid: vlm, "),
    "a misspelt solver": ([put("sampling", {"solver": "Huen"})], r"did you mean heun\? valid: euler, heun"),
    "a misspelt word beside true and false": (
        [put("kernels", {"compile": "auot"})],
        r":\n  kernels\.compile: unknown value; did you mean auto\? valid: auto, true, false \(got 'auot'\)$",
    ),
    "a resolution that is a word": (
        [put("stages", 0, "resolution", "big")],
        r":\n  stages\.0\.resolution: Input should be a valid integer.*\(got 'big'\)$",
    ),
    "a resolution of several that is a word": (
        [put("stages", 0, "resolution", [64, "big"])],
        r":\n  stages\.0\.resolution\.1: Input should be a valid integer.*\(got 'big'\)$",
    ),
    "an unknown benchmark": (
        [put("evaluation", {"benchmarks": {"shape": {}}})],
        r"benchmarks\.shape: unknown field; did you mean shapes",
    ),
    "an unknown option of a benchmark": (
        [put("evaluation", {"benchmarks": {"shapes": {"number": 3}}})],
        "unknown field; valid: seed, batch, resamples, prompts",
    ),
    "a URL for a folder": ([put("data", "shards", "s3://bucket/x")], "s3://bucket/x is a URL.*data.remote"),
    "no clipping": ([put("stages", 0, "optimizer", {"lr": 1, "clip": 0})], "greater than 0"),
}


@pytest.mark.parametrize(("bends", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_its_reason(tmp_path: Path, bends: list[Bend], reason: str):
    content = tree()
    load_curriculum(write(tmp_path, content))
    for bend in bends:
        bend(content)
    with pytest.raises(ConfigError, match=reason):
        load_curriculum(write(tmp_path, content))


def test_the_example_of_a_message_is_valid_where_it_is_shown(tmp_path: Path):
    """A number in the place of every section and list; its message shows a value that the field takes."""
    fields = [name for name in Curriculum.model_fields if name not in ("name", "seed", "export", "threads")]
    fields += [f"stages.first.{name}" for name in ("trains", "objective", "optimizer", "mixture", "gate", "benchmarks")]
    settings = [f"{name}=%s" for name in fields]
    settings += ["data.prepare={sources: %s}", "data.prepare={sources: [%s]}", "recipe={kind: wemmu, lora: {dit: %s}}"]
    file = write(tmp_path, tree())
    for setting in settings:
        with pytest.raises(ConfigError) as caught:
            load_curriculum(file, [setting % 3])
        line = str(caught.value).splitlines()[1]
        example = re.fullmatch(r"\S+: must be a (?:mapping|list), e\.g\. (.+?)(?: \(.*)?", line.strip())
        assert example is not None, line
        said = ""
        try:
            load_curriculum(file, [setting % example[1]])
        except ConfigError as error:
            said = str(error)
        # Every field is of the right form; whether they fit each other the example cannot know.
        assert not said or "Curriculum: " in said, said


def test_a_config_of_an_earlier_version_tells_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture):
    """By the objective of its stages; it had the fields of all recipes side by side."""
    old = tree() | {"bridge": {"position_table": 9}}
    assert load_curriculum(write(tmp_path, old)).recipe == WeMMU(bridge=Bridge(position_table=9))
    assert "`bridge` has moved, write `recipe: {kind: wemmu, bridge: {...}}`" in capsys.readouterr().err
    assert load_curriculum(write(tmp_path, old), ["bridge.queries.std=2"]).recipe.bridge.queries.std == 2
    both = load_curriculum(write(tmp_path, old), ["recipe.bridge.queries.number=4"]).recipe.bridge
    assert (both.position_table, both.queries.number) == (9, 4)
    for later in ("recipe.bridge.position_table=8", "bridge.position_table=8"):
        assert load_curriculum(write(tmp_path, old), [later]).recipe.bridge.position_table == 8
    old = tree() | {"reconstruction": {"target": "pixels"}, "stages": [tree()["stages"][0] | ROSS]}
    ross = load_curriculum(write(tmp_path, old), ["reconstruction.layer=1"]).recipe
    assert isinstance(ross, Ross)
    assert (ross.target.kind, ross.layer) == ("pixels", 1)


@pytest.mark.parametrize("kind", ["wemmu", "ross"])
def test_a_run_folder_of_an_earlier_version_is_read_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
):
    """It holds the fields of all recipes, and the first versions did not say where they were written."""
    old = tree() | {"bridge": {"position_table": 9}, "reconstruction": {"target": "pixels"}}
    if kind == "ross":
        old["stages"] = [old["stages"][0] | ROSS]
    expected = {"wemmu": WeMMU(bridge=Bridge(position_table=9)), "ross": Ross(target="pixels")}[kind]
    curriculum = load_curriculum(write(tmp_path, old))
    assert curriculum.recipe == expected
    run = curriculum.stage_run("first" if kind == "wemmu" else "align").model_dump(mode="json", exclude={"recipe"})
    write(tmp_path, run | {name: old[name] for name in ("bridge", "reconstruction")})
    assert load_stage(tmp_path / "curriculum.yaml").recipe == expected
    assert capsys.readouterr().err == ""


def test_the_offload_that_was_the_generators_own_is_read_as_that_of_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    old = tree() | {"recipe": {"generator": {"offload": True, "export": "pipeline"}}}
    assert _offloaded({name: value for name, value in old.items() if name != "memory"})["memory"] == {
        "offload": ["generator"]
    }
    read, told = upgraded_file(old)
    assert read["recipe"] == {"generator": {"export": "pipeline"}}
    assert read["memory"]["offload"] == ["generator"]
    assert told == {"recipe.generator.offload": "`memory: {offload: [generator]}`"}


def test_fields_are_read_under_their_earlier_names(tmp_path: Path, capsys: pytest.CaptureFixture):
    now, old = tree(), tree()
    sizing = {"sources": [{"kind": "shapes", "samples": {"t2i": 9}}]}
    rule = {"resolution": [32, 64], "next_resolution": {"samples": 32}}
    now["memory"]["cached_images"], now["data"]["prepare"] = 7, sizing | {"images": {"unit": 16}}
    now["stages"][1] |= rule
    now["stages"][0]["optimizer"]["module_lr"] = {"dit": 0.5}
    old["memory"]["cached_pictures"], old["data"]["prepare"] = 7, sizing | {"pictures": {"unit": 16}}
    old["stages"][1] |= {"resolution": [32, 64], "next_rung": {"samples": 32}}
    # A run folder's file has both, of which a recipe has one.
    old["stages"][0]["optimizer"] |= {"dit_lr": 0.5, "head_lr": None}
    curriculum = load_curriculum(write(tmp_path, now))
    assert load_curriculum(write(tmp_path, old)) == curriculum
    told = capsys.readouterr().err
    assert "the field `memory.cached_pictures` has moved, write `cached_images`" in told
    assert "`stages.*.next_rung` has moved, write `next_resolution`" in told
    assert "`stages.*.optimizer.dit_lr` has moved, write `module_lr: {dit: ...}`" in told
    rate = "stages.*.optimizer.dit_lr=0.25"
    changed = load_curriculum(
        write(tmp_path, old),
        ["memory.cached_pictures=8", "stages.second.next_rung.samples=64", "data.prepare.pictures.unit=32", rate],
    )
    assert [stage.optimizer.module_lr for stage in changed.stages] == [{"dit": 0.25}] * 2
    assert changed.memory.cached_images == 8
    assert changed.data.prepare is not None
    assert changed.data.prepare.images.unit == 32
    assert changed.stages[1].next_resolution == NextResolution(samples=64)
    with pytest.raises(ConfigError, match=r"memory\.cached_images is 8 and, under its name of earlier versions, 7"):
        load_curriculum(write(tmp_path, old | {"memory": old["memory"] | {"cached_images": 8}}))
    # The config of a job in a run folder.
    run = curriculum.resolution_runs("second")[0]
    content = run.model_dump(mode="json")
    content["stage"] |= {
        "ladder": content["stage"].pop("resolutions"),
        "next_rung": content["stage"].pop("next_resolution"),
    }
    optimizer = content["stage"]["optimizer"]
    optimizer |= {"head_lr": None, "dit_lr": optimizer.pop("module_lr").get("dit")}
    assert load_stage(write(tmp_path, content)) == run


def test_warm_up_and_decay_may_fill_the_stage_exactly(tmp_path: Path):
    content = tree()
    content["stages"][0]["optimizer"] |= {"warmup": 60, "decay": 40}
    assert load_curriculum(write(tmp_path, content)).stages[0].optimizer.decay == 40


def test_a_share_of_the_steps_is_the_schedule_of_as_many_steps(tmp_path: Path):
    content = tree()
    content["stages"][0]["optimizer"] |= {"warmup": 0.29, "decay": 0.5}
    shared = load_curriculum(write(tmp_path, content)).stages[0].optimizer
    counted = shared.model_copy(update={"warmup": 29, "decay": 50})
    assert [shared.lr_share(s, 100) for s in range(100)] == [counted.lr_share(s, 100) for s in range(100)]
    assert shared.schedule(7) == (2, 3)
    assert load_curriculum(write(tmp_path, content), ["stages.*.steps=7"]).stages[0].steps == 7
    # Steps that an older config wrote as 20.0 stay steps; what may mean one step or all of them is refused.
    assert Optimizer(lr=1, warmup=20.0).warmup == 20
    for wrong in (1.0, -1, 1.5, -0.5):
        with pytest.raises(ValueError, match="below 1 a share of the stage's steps"):
            Optimizer(lr=1, decay=wrong)


def test_learnable_queries_are_accepted_where_every_stage_trains_them():
    content = tree()
    LEARNABLE(content)
    for stage in content["stages"]:
        stage["trains"].append("queries")
    assert Curriculum.model_validate(content).recipe.bridge.queries.number == 64


def test_a_stage_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="no stage 'third'; valid choices: first, second"):
        Curriculum.model_validate(tree()).stage_run("third")


RESOLUTIONS = st.sampled_from([16, 32, 64, 512, 1024])


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 200), RESOLUTIONS, RESOLUTIONS)
def test_micro_batch_accumulation_and_ranks_multiply_to_the_global_batch(micro, world, per_rank, resolution, reference):
    memory = Memory(micro_batch=micro, reference_resolution=reference)
    fits, steps = memory.micro_batch_at(resolution, per_rank * world, world)
    assert fits * steps * world == per_rank * world
    room = micro * reference**2
    assert fits == 1 or fits * resolution**2 <= room
    larger = [m for m in range(fits + 1, per_rank + 1) if per_rank % m == 0 and m * resolution**2 <= room]
    assert larger == [], "a larger micro-batch would have fitted"


def test_memory_goes_with_the_area_and_ranks_must_share_the_global_batch():
    memory = Memory(micro_batch=16, reference_resolution=512)
    with pytest.raises(ValueError, match="10 is not a multiple of the 4 ranks"):
        memory.micro_batch_at(512, 10, 4)
    assert memory.micro_batch_at(512, 64) == (16, 4)
    assert memory.micro_batch_at(1024, 64) == (4, 16)
    assert memory.micro_batch_at(256, 64) == (64, 1)


SCHEDULES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.floats(0, 1)).filter(
    lambda s: sum(s[:3]) > 0
)


@given(SCHEDULES)
def test_the_rate_warms_up_stays_and_falls_without_a_jump(schedule: tuple[int, int, int, float]):
    warmup, constant, decay, final = schedule
    steps = warmup + constant + decay
    optimizer = Optimizer(lr=1, warmup=warmup, decay=decay, final_lr_share=final)
    share = [optimizer.lr_share(step, steps) for step in range(steps)]
    assert min(share) > 0
    assert share[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert share[warmup : warmup + constant] == [1.0] * constant
    falling = share[warmup + constant :]
    before = [1.0, *falling]
    assert all(a >= b for a, b in zip(before, falling, strict=False))
    steepest = math.pi / 2 / (decay + 1)
    assert all(a - b <= steepest + 1e-9 for a, b in zip(before, falling, strict=False))
    if decay:
        assert optimizer.lr_share(steps, steps) == pytest.approx(final), "the step after the last would have it"
        assert final - 1e-9 <= falling[-1] <= final + steepest


def test_several_resolutions_are_the_stage_at_each():
    content = tree()
    content["stages"][0] |= {"resolution": [32, 48, 64], "next_resolution": {"samples": [17, 100]}}
    curriculum = Curriculum.model_validate(content)
    steps = [run.stage for run in curriculum.resolution_runs("first")]
    assert [step.label for step in steps] == ["first@32", "first@48", "first@64"]
    # So many samples have been seen after 2 and after 7 more steps of 16.
    assert [step.span for step in steps] == [(0, 2), (2, 9), (9, 100)]
    assert [step.limit for step in steps] == [2, 7, None]
    assert curriculum.stage_run("first").stage == steps[-1]
    [whole] = curriculum.resolution_runs("second")
    assert (whole.stage.label, whole.stage.span) == ("second", (0, 100))


def test_an_autoencoder_is_asked_for_only_where_the_target_is_made_with_it():
    alone = ["backbones={vlm: assets/shapes/vlm}"]
    for target in ("pixels", "{kind: features, encoder: assets/shapes/encoders/dino}"):
        curriculum = load_curriculum(EXAMPLE, [*alone, f"recipe.target={target}"])
        assert curriculum.backbones.directories(curriculum.recipe.backbones).keys() == {"vlm"}
    for target in ("latents", "latent2pixel"):
        with pytest.raises(ConfigError, match=r"the recipe ross needs backbones\.vae, a directory"):
            load_curriculum(EXAMPLE, [*alone, f"recipe.target={target}", "recipe.head={kind: mlp}"])
    with pytest.raises(ConfigError, match=r"data\.prepare\.latents needs backbones\.vae"):
        load_curriculum(EXAMPLE, [*alone, "recipe.target=pixels", "data.prepare.latents={}"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_name_of_its_folder_and_its_objectives_have_titles(recipe: type[RecipeConfig]):
    assert recipe.__module__ == f"wemmu.recipes.{recipe.model_fields['kind'].default}.config"
    for objective in recipe.objectives:
        assert tuple(objective.titles) == get_args(objective.model_fields["kind"].annotation)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_module_learns_at_its_rate_wherever_its_weights_are(recipe: type[RecipeConfig]):
    optimizer = Optimizer(lr=1.0, module_lr={name: n + 2.0 for n, name in enumerate(recipe.modules)}, weight_decay=0.5)
    chosen = recipe.model_construct()
    for n, prefixes in enumerate(recipe.modules.values()):
        for prefix in prefixes:
            assert optimizer.rates(chosen.module_of(f"{prefix}layer.weight"), 2) == (n + 2.0, 0.5)
    assert optimizer.rates(chosen.module_of("elsewhere.weight"), 2) == (1.0, 0.5)
