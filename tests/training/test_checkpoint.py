"""Checkpoints: exact, whole or not there, and never trusted when they are damaged."""

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from tests.checkpoints import differing, load_state, load_weights
from wemmu.checkpoint import manifest as manifest_module
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.finite import NotFiniteError
from wemmu.checkpoint.manifest import Origin, read_manifest, sha256_of, verify, write_manifest
from wemmu.checkpoint.metadata import _Index
from wemmu.checkpoint.sharded_tensor import ShardedTensor, flat_parts
from wemmu.checkpoint.start import start_from
from wemmu.checkpoint.state import TrainState
from wemmu.checkpoint.stored import StoredTensors, export_weights, newest_finite

FROZEN = {"vlm": "a" * 64, "vae": "b" * 64, "dit": "c" * 64}
WITHOUT_DIT = {"vlm": FROZEN["vlm"], "vae": FROZEN["vae"]}
TRAINED = ("bridge.table", "bridge.linear.weight", "bridge.linear.bias")
LAYOUT = {"engine": "single", "ranks": 1, "tp": 1, "pp": 1}
REPOSITORY = Path(__file__).parents[2]
# What the first version of the format wrote: `save` below, of that day, with `dit_weights` carried.
OLD = Path(__file__).parent / "format1" / "step_00000004"


def start(model: nn.Module, source: Path, identities: dict[str, str]) -> frozenset[str]:
    return start_from(source, held_of(model), identities)


def make_state(step: int) -> TrainState:
    g = torch.Generator().manual_seed(step)
    shapes = {"bridge.table": (3, 3, 4), "bridge.linear.weight": (2, 4), "bridge.linear.bias": (2,)}
    parts = [{name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(3)]
    return TrainState(*parts, step)


def other_state(dtype: torch.dtype = torch.float32) -> TrainState:
    """A live state of the same names and shapes and of other values."""
    state = make_state(0)
    return TrainState(*({n: t.to(dtype) for n, t in d.items()} for d in parts_of(state)), steps=0)


def parts_of(state: TrainState) -> tuple[dict[str, Tensor], ...]:
    return state.weights, state.exp_avg, state.exp_avg_sq


def same(one: TrainState, other: TrainState) -> bool:
    return not any(map(differing, parts_of(one), parts_of(other)))


def origin(frozen: dict[str, str] = FROZEN) -> Origin:
    return Origin("stage1", 7, 32, frozen, LAYOUT)


def save(root: Path, step: int = 4, carried: dict[str, Tensor] | None = None, frozen: dict[str, str] = FROZEN) -> Path:
    return store.save(root, make_state(step), carried or {}, origin(frozen))


def make_model(*extra: str) -> nn.Module:
    """A stand-in with the canonical names: a frozen VLM, the bridge of `make_state`, and a DiT."""
    bridge = nn.ModuleDict({"linear": nn.Linear(4, 2), **{name: nn.Linear(1, 1) for name in extra}})
    bridge.register_parameter("table", nn.Parameter(torch.zeros(3, 3, 4)))
    return nn.ModuleDict({"vlm": nn.Linear(1, 1), "bridge": bridge, "dit": nn.Linear(2, 2)})


def held_of(model: nn.Module) -> dict[str, Tensor]:
    """What a stage could leave behind."""
    return {name: p.detach() for name, p in model.named_parameters() if not name.startswith("vlm.")}


def dit_weights() -> dict[str, Tensor]:
    return {"dit.weight": torch.full((2, 2), 5.0), "dit.bias": torch.full((2,), 6.0)}


def files_of(directory: Path) -> list[Path]:
    return sorted(f for f in directory.rglob("*") if f.is_file() and f.name != "manifest.json")


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path):
    state = other_state()
    manifest = load_state(save(tmp_path), state)
    assert (manifest.step, manifest.seed, manifest.stage, manifest.resolution) == (4, 7, "stage1", 32)
    assert same(state, make_state(4))


def test_loading_fills_the_live_tensors_whatever_their_type_and_strides(tmp_path: Path):
    state = other_state(torch.bfloat16)
    live = state.weights["bridge.linear.weight"] = torch.zeros(4, 2, dtype=torch.bfloat16).t()
    load_state(save(tmp_path), state)
    rounded = ({n: t.bfloat16() for n, t in d.items()} for d in parts_of(make_state(4)))
    assert same(state, TrainState(*rounded, steps=4))
    assert state.weights["bridge.linear.weight"] is live


def test_what_is_saved_in_another_type_is_stored_in_float32(tmp_path: Path):
    carried = {"dit.weight": torch.full((2, 2), 1 / 3, dtype=torch.bfloat16)}
    weights, _ = load_weights(save(tmp_path, carried=carried))
    assert torch.equal(weights["dit.weight"], carried["dit.weight"].float())
    stored = FileSystemReader(tmp_path / "step_00000004" / "state").read_metadata().state_dict_metadata
    assert {tensor.properties.dtype for tensor in stored.values()} == {torch.float32}


def test_a_checkpoint_of_the_first_version_is_loaded():
    state = other_state()
    manifest = load_state(OLD, state)
    assert same(state, make_state(4))
    assert (manifest.step, manifest.layout) == (4, {})
    assert differing(load_weights(OLD)[0], make_state(4).weights | dit_weights()) == []


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3", "stage4"])
def test_the_weights_that_are_shipped_are_loaded(stage: str):
    weights, manifest = load_weights(REPOSITORY / "assets" / "shapes" / stage)
    assert {name: list(weight.shape) for name, weight in weights.items()} == manifest.tensors


def averaged_state(step: int) -> TrainState:
    state = make_state(step)
    return replace(state, ema={name: weight + 1 for name, weight in state.weights.items()})


def test_averages_are_saved_and_loaded_beside_the_weights(tmp_path: Path):
    directory, live = store.save(tmp_path, averaged_state(4), {}, origin()), averaged_state(0)
    assert load_state(directory, live).ema
    assert all(torch.equal(live.ema[name], weight + 1) for name, weight in make_state(4).weights.items())
    plain = other_state()
    load_state(directory, plain)
    assert same(plain, make_state(4))
    assert plain.ema == {}


@pytest.mark.parametrize("old", [True, False], ids=["of the first version", "of this version"])
def test_an_average_that_a_checkpoint_does_not_hold_begins_with_its_weights(tmp_path: Path, old: bool):
    directory, live = OLD if old else save(tmp_path), averaged_state(0)
    assert not load_state(directory, live).ema
    assert differing(live.ema, live.weights) == []
    assert same(live, make_state(4))


def test_a_model_is_read_with_its_averages_or_with_its_weights(tmp_path: Path):
    directory = store.save(tmp_path, averaged_state(4), dit_weights(), origin(WITHOUT_DIT))
    for ema in (False, True):
        into, shipped = {name: torch.zeros_like(w) for name, w in dit_weights().items()}, tmp_path / f"shipped{ema}"
        into |= {name: torch.zeros_like(w) for name, w in make_state(0).weights.items()}
        assert start_from(directory, into, FROZEN, ema) == into.keys()
        export_weights(directory, shipped, torch.float32, ema)
        for found in (into, load_weights(shipped)[0]):
            assert all(torch.equal(found[name], w + ema) for name, w in make_state(4).weights.items())
            # Without an average of their own.
            assert all(torch.equal(found[name], w) for name, w in dit_weights().items())


@pytest.mark.parametrize("shipped", [False, True])
def test_a_weight_that_the_config_widened_begins_with_what_was_trained_and_zeros(tmp_path: Path, shipped: bool):
    directory, name = save(tmp_path), "bridge.linear.weight"
    if shipped:
        export_weights(directory, tmp_path / "shipped", torch.float32, False)
        directory = tmp_path / "shipped"
    narrow = make_state(4).weights[name]
    whole = torch.cat([narrow, torch.zeros_like(narrow)], 1)
    flat = torch.full((11,), 7.0)  # From the third of 16 elements on, as a rank of ZeRO-3 has them.
    into = make_state(0).weights
    into[name] = ShardedTensor((2, 8), flat_parts((2, 8), 3, flat))
    with pytest.raises(CheckpointError, match=r"bridge.linear.weight has shape \[2, 4\], not \[2, 8\]"):
        start_from(directory, into, FROZEN)
    start_from(directory, into, FROZEN, widened={name})
    assert torch.equal(flat, whole.flatten()[3:14])
    into[name] = torch.zeros(2, 6)
    with pytest.raises(CheckpointError, match=r"not \[2, 6\]"):
        start_from(directory, into, FROZEN, widened={name})


def test_averages_that_are_not_there_are_an_error_that_says_what_to_do(tmp_path: Path):
    without = save(tmp_path)
    export_weights(store.save(tmp_path / "with", averaged_state(4), {}, origin()), tmp_path / "shipped")
    for directory in (without, OLD, tmp_path / "shipped"):
        with pytest.raises(CheckpointError, match=r"holds no moving average .*ema_decay.* --no-ema"):
            StoredTensors(directory, ema=True)
        with pytest.raises(CheckpointError, match=r"holds no moving average .*ema_decay.* --no-ema"):
            store.fill_weights(directory, verify(directory), {}, ema=True)


def test_reading_one_tensor_of_many_reads_and_keeps_little_more_than_it(tmp_path: Path):
    """In a process of its own: bytes that it reads, and the growth of its memory at its greatest, in tensors."""
    each, number = 1_000_000, 12
    many = {f"bridge.{i}": torch.full((each,), float(i)) for i in range(number)}
    directory = store.save(tmp_path, TrainState(many, many, many, 1), {}, origin())
    code = f"""
        from pathlib import Path
        from wemmu.checkpoint.stored import StoredTensors

        def read() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        def kilobytes(field: str) -> int:
            return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

        stored = StoredTensors(Path({str(directory)!r}))
        stored.read("bridge.1")  # what is read and kept once, code
        before, resident = read(), kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        weight = stored.read("bridge.7")
        assert weight.mean() == 7
        print((read() - before) / {4 * each}, (kilobytes("VmHWM") - resident) * 1024 / {4 * each})
    """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    bytes_read, memory = map(float, said.split())
    assert 1 <= bytes_read < 1.1
    assert memory < 3


def test_a_state_of_other_names_or_shapes_is_refused_by_name_and_left_alone(tmp_path: Path):
    directory = save(tmp_path, carried=dit_weights())
    more, fewer, odd = other_state(), other_state(), other_state()
    for held in parts_of(more):
        held["bridge.queries"] = torch.zeros(1)
    for held in parts_of(fewer):
        del held["bridge.table"]
    odd.exp_avg["bridge.linear.bias"] = torch.zeros(3)
    for state, why in (
        (more, r"it lacks exp_avg\.bridge\.queries, .* and holds unknown nothing"),
        (fewer, r"it lacks nothing and holds unknown exp_avg\.bridge\.table"),
        (odd, r"exp_avg\.bridge\.linear\.bias has shape \[2\], not \[3\]"),
    ):
        before = {n: t.clone() for n, t in state.weights.items()}
        with pytest.raises(CheckpointError, match=why):
            load_state(directory, state)
        assert differing(state.weights, before) == []


def test_the_manifest_lists_every_file_and_every_tensor(tmp_path: Path):
    directory = save(tmp_path, carried=dit_weights())
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {directory / name for name in manifest["files"]} == set(files_of(directory))
    shapes = {n: list(w.shape) for n, w in (make_state(4).weights | dit_weights()).items()}
    assert manifest["tensors"] == shapes
    assert manifest["trained"] == sorted(TRAINED)
    assert manifest["frozen"] == FROZEN
    assert manifest["layout"] == LAYOUT
    assert {"python", "torch", "transformers", "diffusers"} <= manifest["libraries"].keys()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(flip_a_byte, "damaged", id="flipped byte"),
        pytest.param(truncate, "damaged", id="truncated"),
        pytest.param(Path.unlink, "missing", id="missing"),
    ],
)
def test_damage_to_any_file_is_found_and_names_the_file(tmp_path: Path, damage, word: str):
    whole = save(tmp_path / "whole")
    for file in files_of(whole):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        damage(copy / file.relative_to(whole))
        for read in (verify, lambda d: load_state(d, other_state()), load_weights):
            with pytest.raises(CheckpointError, match=rf"copy: the file {file.relative_to(whole)} is {word}"):
                read(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize("content", [None, "", '{"format": 1}', "[]"], ids=["none", "empty", "half", "list"])
def test_a_directory_without_a_readable_manifest_is_no_checkpoint(tmp_path: Path, content: str | None):
    directory = save(tmp_path)
    (directory / "manifest.json").unlink()
    if content is not None:
        (directory / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        verify(directory)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"step": 5}, r"manifest\.json is damaged"),
        ({"trained": []}, r"manifest\.json is damaged"),
        ({"sha256": "0" * 64}, r"manifest\.json is damaged"),
        ({"format": 99}, "format 99"),
    ],
)
def test_a_manifest_that_was_changed_or_is_of_another_format_is_refused(tmp_path: Path, changed: dict, why: str):
    file = save(tmp_path) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(CheckpointError, match=why):
        verify(file.parent)


def test_training_goes_on_from_the_newest_whole_checkpoint_others_refuse_a_damaged_newest_one_and_debris_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    save(tmp_path, 2)
    middle, newest = save(tmp_path, 10), save(tmp_path, 100)
    assert retention.latest(tmp_path) == newest
    truncate(files_of(newest)[0])
    debris = tmp_path / "step_00000200.tmp"
    shutil.copytree(middle, debris)
    with pytest.raises(CheckpointError, match=f"{newest}.*is damaged.*the newest that is whole is {middle}"):
        retention.latest(tmp_path)
    state = other_state()
    assert store.load_newest(tmp_path, state).step == 10
    assert same(state, make_state(10))
    assert debris.exists()
    retention.clear_debris(tmp_path)
    assert not debris.exists()
    assert f"skipping a checkpoint: {newest}" in capsys.readouterr().out


def test_the_newest_is_hashed_once_and_an_empty_folder_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert retention.latest(tmp_path) is None
    assert store.load_newest(tmp_path, other_state()) is None
    save(tmp_path, 2)
    newest = save(tmp_path, 3)
    hashed: list[Path] = []
    monkeypatch.setattr(manifest_module, "sha256_of", lambda file: hashed.append(file) or sha256_of(file))
    store.load_newest(tmp_path, other_state())
    assert sorted(hashed) == files_of(newest)


def test_a_damaged_checkpoint_is_written_again_whole(tmp_path: Path):
    directory = save(tmp_path)
    flip_a_byte(files_of(directory)[0])
    assert save(tmp_path) == directory
    verify(directory)


def test_a_disk_that_fails_within_a_tensor_is_told_as_such_and_leaves_nothing_with_a_name(tmp_path: Path):
    large = {"bridge.table": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_00000001 was not written: rank 0: OSError: .*File too large"):
            store.save(tmp_path, TrainState(large, large, large, 1), {}, origin())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert retention.latest(tmp_path) is None


def test_prune_keeps_the_newest_and_everything_while_that_is_damaged(tmp_path: Path):
    directories = [save(tmp_path, step) for step in (1, 2, 3, 10)]
    retention.prune(tmp_path, keep=2)
    assert sorted(tmp_path.iterdir()) == directories[2:]
    flip_a_byte(files_of(directories[-1])[0])
    with pytest.raises(CheckpointError, match="damaged"):
        retention.prune(tmp_path, keep=1)
    assert sorted(tmp_path.iterdir()) == directories[2:]


def test_shipped_weights_are_all_weights_without_moments_and_rounded_only_to_the_type_asked_for(tmp_path: Path):
    directory = save(tmp_path / "run", carried=dit_weights())
    export_weights(directory, tmp_path / "out", torch.float32)
    weights, manifest = load_weights(tmp_path / "out")
    expected = make_state(4).weights | dit_weights()
    assert differing(weights, expected) == []
    assert (manifest.step, manifest.frozen, manifest.trained) == (4, FROZEN, [])
    flip_a_byte(tmp_path / "out" / store.SHIPPED)
    with pytest.raises(CheckpointError, match=store.SHIPPED):
        load_weights(tmp_path / "out")
    # Unless another type is asked for.
    export_weights(directory, tmp_path / "half")
    for name, weight in load_weights(tmp_path / "half")[0].items():
        assert torch.equal(weight, expected[name].half().float())


def test_a_stage_starts_from_trained_and_carried_weights(tmp_path: Path):
    model = make_model()
    started = start(model, save(tmp_path, carried=dit_weights(), frozen=WITHOUT_DIT), FROZEN)
    expected = make_state(4).weights | dit_weights()
    assert started == expected.keys()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in expected.items())
    # Or from a bridge whose DiT was frozen.
    model = make_model()
    before = model["dit"].weight.clone()
    assert start(model, save(tmp_path / "frozen"), FROZEN) == set(TRAINED)
    assert torch.equal(model["dit"].weight, before)


@pytest.mark.parametrize(
    ("extra", "saved", "identities", "why"),
    [
        *(((), {}, {part: "f" * 64}, f"trained with another {part}") for part in FROZEN),
        (("queries",), {}, {}, r"lacks bridge\.queries\.bias, bridge\.queries\.weight"),
        ((), {"carried": {"bridge.vae_branch.weight": torch.zeros(1)}}, {}, r"unknown bridge\.vae_branch\.weight"),
        # It was trained, but is absent.
        ((), {"frozen": WITHOUT_DIT}, {}, r"lacks dit\.bias, dit\.weight"),
    ],
)
def test_a_stage_does_not_start_from_what_does_not_fit(tmp_path: Path, extra, saved, identities, why: str):
    with pytest.raises(CheckpointError, match=why):
        start(make_model(*extra), save(tmp_path, **saved), FROZEN | identities)


def test_a_stage_with_start_other_vae_starts_from_weights_of_any_autoencoder(tmp_path: Path):
    assert start(make_model(), save(tmp_path), {k: v for k, v in FROZEN.items() if k != "vae"}) == set(TRAINED)


def test_a_tensor_of_another_shape_is_named_and_nothing_is_loaded(tmp_path: Path):
    state = make_state(4)
    weights = state.weights | {"bridge.linear.bias": torch.zeros(3)}
    source = store.save(tmp_path, replace(state, weights=weights), {}, origin())
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"bridge\.linear\.bias has shape \[3\], not \[2\]"):
        start(model, source, FROZEN)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)


def test_an_index_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path):
    directory = save(tmp_path / "run")
    index = directory / "state" / ".metadata"
    index.write_bytes(pickle.dumps([Evil(tmp_path / "was here"), pickle.loads(index.read_bytes())]))
    # Whoever makes such an index makes the hashes that go with it.
    manifest = read_manifest(directory)
    files = manifest.files | {"state/.metadata": sha256_of(index)}
    write_manifest(directory, replace(manifest, files=files))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, which does not belong in an index"):
        load_weights(directory)
    assert not (tmp_path / "was here").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "was here").exists()


def test_a_value_that_is_no_tensor_is_not_unpickled(tmp_path: Path):
    directory = save(tmp_path / "run")
    values = {f"model.{name}": weight for name, weight in make_state(4).weights.items()}
    values["model.bridge.linear.bias"] = Evil(tmp_path / "was here")
    dcp.save(values, checkpoint_id=directory / "state", no_dist=True)
    files = {str(f.relative_to(directory)): sha256_of(f) for f in (directory / "state").iterdir()}
    write_manifest(directory, replace(read_manifest(directory), files=files))
    with pytest.raises(CheckpointError, match=r"Missing key .*model\.bridge\.linear\.bias"):
        load_weights(directory)
    assert not (tmp_path / "was here").exists()


class Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickles the member of an enumeration."""

    def __init__(self, of: type, name: str):
        self.of, self.name = of, name

    def __reduce__(self) -> tuple:
        return getattr, (self.of, self.name)


def test_an_index_of_an_early_python_3_11_is_read_and_its_getattr_gets_members_only():
    layout = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    found = _Index(io.BytesIO(pickle.dumps([Attribute(_MEM_FORMAT_ENCODING, layout.name)]))).load()
    assert found == [layout]
    for name in ("__init__", "mro"):
        for of in (_MEM_FORMAT_ENCODING, Metadata):
            with pytest.raises(pickle.UnpicklingError, match="does not belong in an index"):
                _Index(io.BytesIO(pickle.dumps(Attribute(of, name)))).load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", range(3))
def test_what_is_not_finite_is_not_saved(part: int, value: float, tmp_path: Path):
    state = make_state(4)
    parts_of(state)[part]["bridge.table"][1, 2, 3] = value
    with pytest.raises(NotFiniteError, match=r"step_00000004 was not written: not finite are \w+\.bridge\.table$"):
        store.save(tmp_path, state, {}, origin())
    assert list(tmp_path.iterdir()) == []
    # Large values, whose sum overflows, are.
    parts_of(state)[part]["bridge.table"].fill_(3e38)
    store.save(tmp_path, state, {}, origin())


def test_nothing_is_made_of_a_checkpoint_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As versions before this check wrote them."""
    root = tmp_path / "checkpoints"
    whole = save(root, 4)
    state = make_state(6)
    state.weights["bridge.table"][0] = float("inf")
    with monkeypatch.context() as patch:
        patch.setattr(store, "check_finite", lambda *_: None)
        bad = store.save(root, state, dit_weights(), origin())
    with pytest.raises(NotFiniteError, match="step_00000006 cannot be resumed from"):
        store.load_newest(root, other_state())
    with pytest.raises(NotFiniteError, match=r"not finite are bridge\.table"):
        load_weights(bad)
    with pytest.raises(NotFiniteError, match=r"not finite are bridge\.table"):
        start(make_model(), bad, FROZEN)
    with pytest.raises(NotFiniteError):
        export_weights(bad, tmp_path / "shipped")
    assert not (tmp_path / "shipped" / "manifest.json").exists()
    assert newest_finite(root) == whole
