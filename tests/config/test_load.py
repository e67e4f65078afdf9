"""Reading configs: overrides, bases, round trips, and errors that a person can act on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster import Cluster
from tests.config.curricula import load_shipped, small_files_of_an_export, tree, write
from wemmu.config import ConfigError, dump, load, load_curriculum, load_stage

REPOSITORY = Path(__file__).parents[2]


def test_an_error_names_file_field_value_and_reason(tmp_path: Path):
    content = tree()
    content["stages"][1]["optimizer"]["lr"] = -0.5
    content["memory"]["micro_batch"] = "many"
    file = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_curriculum(file)
    message = str(caught.value)
    assert str(file) in message
    assert "stages.1.optimizer.lr: Input should be greater than 0 (got -0.5)" in message
    assert "memory.micro_batch: Input should be a valid integer" in message
    assert "(got 'many')" in message


def test_what_only_follows_from_an_error_is_not_told_beside_it(tmp_path: Path):
    """A tuple is too short because its only element is not valid."""
    content = tree()
    prepare = {"sources": [{"kind": "webdataset", "name": "web", "path": ["a.tar"]}]}
    content["data"]["prepare"] = prepare
    with pytest.raises(ConfigError) as caught:
        load_curriculum(write(tmp_path, content))
    assert len(str(caught.value).splitlines()) == 2, str(caught.value)
    assert "sources.0.webdataset.path: Input should be a valid string" in str(caught.value)
    prepare["sources"] = []
    with pytest.raises(ConfigError, match=r"data.prepare.sources: .*at least 1 item"):
        load_curriculum(write(tmp_path, content))


def test_a_field_that_is_missing_and_one_that_is_unknown_are_named(tmp_path: Path):
    content = tree()
    del content["data"]["shards"]
    content["stages"][0]["learning_rate"] = 1
    with pytest.raises(ConfigError) as caught:
        load_curriculum(write(tmp_path, content))
    # Not what stands around the missing field.
    assert "data.shards: Field required\n" in str(caught.value)
    assert "stages.0.learning_rate: unknown field; valid: name, steps, " in str(caught.value)


@pytest.mark.parametrize("content", ["a: [1, 2", "- a\n- b\n", "just words", "name: ${nothing}\n"], ids=str)
def test_what_is_no_config_is_refused_by_its_name(tmp_path: Path, content: str):
    file = write(tmp_path, content)
    with pytest.raises(ConfigError, match=str(file)):
        load_curriculum(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_curriculum(tmp_path / "absent.yaml")


def test_a_folder_is_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a folder; give a YAML file, or continue a run with `wemmu resume`"):
        load_curriculum(tmp_path)


def test_a_run_is_answered_with_its_curriculum_and_a_stage_with_its_config(tmp_path: Path):
    for name in ("curriculum.yaml", "config.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"give .*/curriculum\.yaml, or continue a run with `wemmu resume /"):
        load_curriculum(tmp_path)
    with pytest.raises(ConfigError, match=r"is a folder; give .*/config\.yaml$"):
        load_stage(tmp_path)
    with pytest.raises(ConfigError, match=r"the config of a stage is RUN/STAGE/config\.yaml"):
        load_stage(tmp_path / "absent.yaml")


def test_a_file_of_another_kind_is_named_as_that(tmp_path: Path):
    file = write(tmp_path, tree())
    stage, cluster = tmp_path / "config.yaml", REPOSITORY / "configs/cluster/example.yaml"
    dump(load_curriculum(file).stage_run("first"), stage)
    for given, load_it, kind in (
        (file, load_stage, "a curriculum, which `wemmu run"),
        (stage, load_curriculum, "the config of one stage, which `wemmu train"),
        (cluster, load_curriculum, "a cluster file, which `wemmu submit"),
    ):
        with pytest.raises(ConfigError, match=f"^{given} is {kind}"):
            load_it(given)


def test_a_shipped_config_of_this_very_name_is_meant_first(tmp_path: Path):
    (tmp_path / "dem.yaml").touch()
    with pytest.raises(ConfigError, match=r"did you mean shapes/demo\.yaml"):
        load_curriculum(tmp_path / "demo.yaml")


def test_an_override_reaches_the_stages_it_names_and_the_last_one_wins(tmp_path: Path):
    overrides = ["stages.second.optimizer.lr=0.25", "stages.*.steps=7", "logging.every=3", "seed=1", "seed=2"]
    config = load_curriculum(write(tmp_path, tree()), overrides)
    assert [s.optimizer.lr for s in config.stages] == [0.001, 0.25]
    assert [s.steps for s in config.stages] == [7, 7]
    assert (config.logging.every, config.seed) == (3, 2)


def test_an_override_replaces_whole_values(tmp_path: Path):
    overrides = ["stages.first.mixture={reconstruction: 1.0}", "stages.first.trains=[pathway]"]
    first = load_curriculum(write(tmp_path, tree()), overrides).stages[0]
    assert first.mixture == {"reconstruction": 1.0}
    assert first.trains == ("pathway",)


def test_a_misspelt_field_is_answered_with_the_one_that_is_meant(tmp_path: Path):
    content = tree()
    content["stages"][0]["stepz"] = 1
    content["stages"][0]["optimizer"]["wieght_decay"] = 1
    content["stages"][0]["objective"] = {"kind": "flow", "tme": {}}
    content["data"]["prepare"] = {"sources": [{"kind": "webdataset", "name": "web", "path": ["a"], "captoin": 1}]}
    with pytest.raises(ConfigError) as caught:
        load_curriculum(write(tmp_path, content))
    said, stage = str(caught.value), content["stages"][0]["name"]
    assert f"stages.0.stepz: unknown field; did you mean steps? (stage {stage}) (got 1)" in said
    assert f"did you mean weight_decay? (stage {stage})" in said
    assert f"did you mean time? (stage {stage})" in said
    assert "webdataset.captoin: unknown field; did you mean caption" in said
    # That a field is missing follows from its misspelling and is not said, too.
    del content["data"]["prepare"]
    content["stages"] = [{("stepz" if k == "steps" else k): v for k, v in tree()["stages"][0].items()}]
    with pytest.raises(ConfigError) as caught:
        load_curriculum(write(tmp_path, content))
    assert len(str(caught.value).splitlines()) == 2, str(caught.value)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("stages.third.steps=7", r"stages\.third\.steps=7.*valid choices: first, second, \*"),
        ("seed", "'seed' is not of the form field=value"),
        # The parser would crash the process.
        ("seed=" + "[" * 60_000, "line 1 is nested too deeply"),
        ("logging.evry=3", r"logging\.evry: unknown field; did you mean every\? \(got 3\)"),
    ],
)
def test_an_override_that_cannot_be_is_refused_like_a_field_of_the_file(tmp_path: Path, override: str, why: str):
    with pytest.raises(ConfigError, match=why):
        load_curriculum(write(tmp_path, tree()), [override])


def test_a_file_stands_on_its_base_then_its_overrides_then_the_callers(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, tree(), "base.yaml")
    middle = {"base": "../base.yaml", "seed": 1, "overrides": ["stages.*.steps=50", "stages.first.steps=60"]}
    write(tmp_path / "deep", middle, "middle.yaml")
    top = {"base": "middle.yaml", "name": "top", "overrides": ["seed=5"]}
    config = load_curriculum(write(tmp_path / "deep", top, "top.yaml"), ["stages.second.steps=70"])
    assert (config.name, config.seed) == ("top", 5)
    assert [s.steps for s in config.stages] == [60, 70]
    assert config.memory.micro_batch == 8


def test_a_dumped_curriculum_is_read_back_equal(tmp_path: Path):
    config = load_curriculum(REPOSITORY / "configs/shapes/curriculum.yaml")
    dump(config, tmp_path / "again.yaml")
    assert load_curriculum(tmp_path / "again.yaml") == config


def test_a_dumped_stage_is_read_back_equal_and_holds_all_that_is_shared(tmp_path: Path):
    config = load_curriculum(write(tmp_path, tree()), ["seed=9", "bridge.queries.design=noisy", "threads=2"])
    run = config.stage_run("second")
    assert (run.stage, run.stage_index, run.seed, run.threads) == (config.stages[1].resolution_steps[0], 1, 9, 2)
    dump(run, tmp_path / "config.yaml")
    assert load_stage(tmp_path / "config.yaml") == run


def test_every_config_of_the_repository_is_valid(tmp_path: Path):
    curricula = [file for file in (REPOSITORY / "configs").rglob("*.yaml") if file.parent.name != "cluster"]
    clusters = [*(REPOSITORY / "configs" / "cluster").glob("*.yaml")]
    assert curricula
    assert clusters
    for file in curricula:
        load_shipped(file, tmp_path)
    for file in clusters:
        load(file, Cluster)


def test_config_does_not_import_torch():
    heavy = "{'torch', 'transformers', 'diffusers', 'numpy', 'streaming', 'ray'}"
    code = f"import sys, wemmu.config; print(sorted({heavy} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.first.optimizer.lr=.inf", "stages.0.optimizer.lr: Input should be a finite number"),
        ("stages.first.optimizer.lr=1e999", "stages.0.optimizer.lr: Input should be a finite number"),
        ("stages.first.mixture={t2i: .inf}", "stages.0.mixture.t2i: Input should be a finite number"),
        ("sampling.image=.nan", "sampling.image: Input should be a finite number"),
        ("recipe.bridge.queries.std=1e6", "bridge.queries.std: Input should be less than or equal to 1000"),
        ("stages.first.optimizer.clip=1e30", "optimizer: clip is 1e+30; no number of a config is above 1e+12"),
        ("stages.first.mixture={t2i: 1e30}", "stages.0.mixture.t2i: Input should be less than or equal to"),
        ("sampling.t2i=1e6", "sampling.t2i: Input should be less than or equal to 1000"),
        ("stages.first.steps=10000000000000", "stages.0.steps: Input should be less than or equal to 10"),
        ("data.workers=1000000", "data.workers: Input should be less than or equal to 256"),
        ("stages.first.steps=yes", "stages.0: steps is True: a boolean"),
        ("stages.first.optimizer.betas=[on, 0.9]", "betas is"),
        ("data.shards=???", "'data.shards=???'"),
        ("stages.first.mixture={t2i: 1", "'stages.first.mixture={t2i: 1'"),
    ],
)
def test_no_number_is_another_than_the_one_that_was_meant(tmp_path: Path, override: str, told: str):
    with pytest.raises(ConfigError) as caught:
        load_curriculum(write(tmp_path, tree()), [override])
    assert told in str(caught.value)


def test_a_switch_is_still_one_where_it_belongs(tmp_path: Path):
    assert load_curriculum(write(tmp_path, tree()), ["recipe.bridge.vae_branch=yes"]).recipe.bridge.vae_branch


BROKEN = {
    "latin-1": ("# gr\xf6\xdfe".encode("latin-1"), "line {line} is not UTF-8"),
    "two fields of one name": (b"seed: 1\nseed: 2", "found duplicate key seed"),
    "a leading zero": (b"seed: 010", "line {line}: YAML reads 010"),
    "a time of day": (b"seed: 1:30", "line {line}: YAML reads 1:30"),
    "a value that is still to come": (b"threads: ???", "threads"),
    "a thousand brackets": (b"seed: " + b"[" * 1000 + b"]" * 1000, "line {line} is nested too deeply"),
    "a million brackets": (b"seed: " + b"[" * 10**6, "line {line} is nested too deeply"),
    "itself as base": (b"base: curriculum.yaml", "contains itself"),
    "two bases": (b"base: [a, b]", "base must be the path of one file"),
    "overrides that are no list": (b"overrides: seed=5", "overrides must be a list"),
    "an override that is no text": (b"overrides: [5]", "'5' is not of the form field=value"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_not_what_was_meant_is_named_with_the_line(tmp_path: Path, what: str):
    line, told = BROKEN[what]
    file = write(tmp_path, tree())
    before = file.read_bytes()
    file.write_bytes(before + line + b"\n")
    with pytest.raises(ConfigError) as caught:
        load_curriculum(file)
    assert told.format(line=before.count(b"\n") + 1) in str(caught.value)
    assert str(file) in str(caught.value) or "override" in told or "'5'" in told


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("scheduler/scheduler_config.json", "{}", r"scheduler_config\.json has no field shift"),
        ("model_index.json", '{"_class_name": "WeMMUPipeline"}', r"model_index\.json has no field resolution"),
        ("bridge/config.json", "[]", r"config\.json has no field bridge"),
    ],
)
def test_half_an_export_to_begin_with_is_named(tmp_path: Path, name: str, content: str, words: str):
    export = small_files_of_an_export(tmp_path / "export")
    (export / name).write_text(content)
    begun = tree()
    del begun["backbones"]
    with pytest.raises(ConfigError, match=f"export: .*{words}.*export the run again"):
        load_curriculum(write(tmp_path, begun | {"export": str(export)}))


def test_a_field_within_the_exported_bridge_leaves_those_beside_it(tmp_path: Path):
    export = small_files_of_an_export(tmp_path / "export")
    told = {"position_table": 16, "queries": {"position": "sincos"}, "states": {"layers": 2}}
    (export / "bridge/config.json").write_text(json.dumps({"bridge": told}))
    begun = tree() | {"export": str(export), "recipe": {"bridge": {"queries": {"std": 0.5}, "states": None}}}
    del begun["backbones"]
    bridge = load_curriculum(write(tmp_path, begun)).recipe.bridge
    assert (bridge.position_table, bridge.states.layers) == (16, 2)
    assert (bridge.queries.position, bridge.queries.std) == ("sincos", 0.5)
    with pytest.raises(ConfigError, match=r"recipe.*bridge"):
        load_curriculum(write(tmp_path, begun | {"recipe": {"bridge": "noisy"}}))


def test_what_the_run_of_an_export_did_in_training_alone_is_not_handed_down(tmp_path: Path):
    export = small_files_of_an_export(tmp_path / "export")
    told = {"position_table": 16, "reconstruct_without_vae": 1.0}
    (export / "bridge/config.json").write_text(json.dumps({"bridge": told}))
    begun = tree() | {"export": str(export)}
    del begun["backbones"]
    for own, expected in ({}, 0.0), ({"reconstruct_without_vae": 0.5}, 0.5):
        bridge = load_curriculum(write(tmp_path, begun | {"recipe": {"bridge": own}})).recipe.bridge
        assert (bridge.position_table, bridge.reconstruct_without_vae) == (16, expected)


@pytest.mark.parametrize(
    ("objective", "shift", "reference", "std"),
    [
        (None, 8.0, 64, 1.0),
        ({"time": {"std": 0.5}}, 8.0, 64, 0.5),
        ({"kind": "contrastive", "time": {"shift": 5.0}}, 5.0, 64, 1.0),
        ({"time": {"shift": 5.0, "reference_resolution": 512}}, 5.0, 512, 1.0),
    ],
)
def test_a_field_of_the_times_beside_an_export_leaves_the_others(
    tmp_path: Path, objective: dict | None, shift: float, reference: int, std: float
):
    begun = tree() | {"export": str(small_files_of_an_export(tmp_path / "export"))}
    del begun["backbones"]
    begun["stages"] = [stage | {"objective": objective} for stage in begun["stages"]]
    for stage in load_curriculum(write(tmp_path, begun)).stages:
        time = stage.objective.time
        assert (time.shift, time.reference_resolution, time.std) == (shift, reference, std)
