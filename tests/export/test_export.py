"""From a training checkpoint to a directory of safetensors that draws the same images in anybody's process."""

import dataclasses
import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import tools.export.pipeline as write
import tools.export.stored as stored
from data_pipeline.images import decode
from data_pipeline.records import EncodedImage
from tests.checkpoints import differing, load_weights
from tests.data_pipeline.broken import encode
from tests.export.conftest import Trained, python
from tests.export.fresh import CASES, Case, noise_image
from tools.convert_ckpt import Dtype, main
from tools.export.card import trained_commit
from tools.export.stored import Stored, write_component
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.start import start_from
from wemmu.checkpoint.state import TrainState
from wemmu.command_line import FINAL, UsageError
from wemmu.config import ConfigError, load_stage
from wemmu.config.buckets import RequestSizes
from wemmu.images import fit
from wemmu.pipeline import WeMMUPipeline, beyond
from wemmu.pipeline.pipeline import _DEFAULTS
from wemmu.pixels import on_canvas
from wemmu.prompts import PromptEncoder
from wemmu.published.identity import identity
from wemmu.recipes.staged import startable
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler
from wemmu.source import open_source
from wemmu.training.build import load_trained

TRUNCATED = encode(Image.effect_noise((40, 40), 50), "PNG")[:500]
TOLERANCE = {"atol": 1e-5, "rtol": 0}
BRIDGE_FILE = Path("bridge/diffusion_pytorch_model.safetensors")


def by_training(trained: Trained, case: Case, shift: float | None = None) -> Tensor:
    """A case, drawn by the training model in this process: [1, 3, H, W] in [0, 1]."""
    # As the data pipeline would have written them.
    decoded = [decode(EncodedImage("a.png", encode(noise_image(n), "PNG")), 10**6) for n in case.images]
    rules = RequestSizes(side=64, unit=16, max_aspect=1.0, largest=128)
    _, sizes = rules.of([(image.height, image.width) for image in decoded], case.size)
    resized = [fit(image, *size) for image, size in zip(decoded, sizes, strict=True)]
    stacked, own = on_canvas([[pil_to_tensor(image) for image in resized]], case.size)
    stage = trained.run.stage
    sampler = Sampler(
        trained.model,
        PromptEncoder(trained.run.backbones.vlm),
        shift or stage.objective.time.shift_at(stage.resolution),
    )
    task, seeds = task_of(case.text, len(decoded)), torch.tensor([case.seed])
    request = GenerationRequest(task, [case.text], stacked, case.size, seeds, sizes=own)
    pixels = sampler(request, trained.run.sampling)
    return (pixels / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def strangers(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Every case as a fresh process drew it, in both ways of loading."""
    home = tmp_path_factory.mktemp("stranger")
    python(["-m", "tests.export.fresh", exported, home / "images.safetensors"], home)
    return load_file(home / "images.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_draws_what_training_draws(trained: Trained, strangers: dict[str, Tensor], name: str):
    expected = by_training(trained, CASES[name])
    assert expected.shape == (1, 3, *CASES[name].size)
    # An image that is clipped everywhere would equal any other.
    assert expected.std() > 0.05
    for way in ("wemmu", "diffusers"):
        torch.testing.assert_close(strangers[f"{way}/{name}"], expected, **TOLERANCE)


def test_the_newest_finished_stage_is_exported_with_its_shift_and_resolution(trained: Trained, pipe: WeMMUPipeline):
    stage = trained.run.stage
    assert pipe.config.resolution == stage.resolution == 64
    assert pipe.scheduler.config.shift == stage.objective.time.shift_at(64) != 1.0
    weights, _ = load_weights(trained.checkpoint)
    table = weights["bridge.position_mlp.table"]
    torch.testing.assert_close(pipe.bridge.position_mlp.table, table, atol=0, rtol=0)


def test_everything_is_safetensors_and_the_bridge_has_its_names_of_training(trained: Trained, exported: Path):
    texts = {".json", ".md", ".py", ".txt", ".jinja"}
    assert {f.suffix for f in exported.rglob("*") if f.is_file()} - texts == {".safetensors"}
    weights, _ = load_weights(trained.checkpoint)
    names = {name.removeprefix("bridge.") for name in weights if name.startswith("bridge.")}
    with safe_open(exported / BRIDGE_FILE, "pt") as file:
        assert set(file.keys()) == names


def test_the_card_tells_the_stages_the_settings_the_licence_and_the_parity(exported: Path):
    card = (exported / "README.md").read_text()
    assert "From step 2 of stage2" in card
    assert "stage3" not in card
    assert "max abs difference" in card
    assert "| `num_inference_steps` | 3 |" in card
    # The miniature's weights are this repository's own.
    assert "license: apache-2.0" in card


def test_the_card_names_the_commit_unless_the_run_recorded_none(tmp_path: Path):
    record = tmp_path / "environment.jsonl"
    assert trained_commit(tmp_path) == "unknown"
    record.write_text('{"commit": "old"}\n{"commit": "new"}\n', encoding="utf-8")
    assert trained_commit(tmp_path) == "new"
    # As a downloaded archive without git writes it.
    record.write_text('{"host": "here"}\n', encoding="utf-8")
    assert trained_commit(tmp_path) == "unknown"


def test_a_seed_decides_the_image(pipe: WeMMUPipeline):
    def drawn(**options) -> Tensor:
        return pipe("a red circle", height=32, width=32, output_type="pt", **options).images

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(drawn(seed=1), drawn(seed=1))
    assert not torch.allclose(drawn(seed=1), drawn(seed=2), atol=1e-2)
    assert torch.equal(drawn(generator=generator(1)), drawn(generator=generator(1)))
    assert not torch.allclose(drawn(generator=generator(1)), drawn(generator=generator(2)), atol=1e-2)
    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert torch.equal(first, drawn())
    assert not torch.allclose(first, second, atol=1e-2)


def test_a_image_does_not_depend_on_the_others_of_its_call(pipe: WeMMUPipeline):
    one, two = noise_image(0), noise_image(1)
    texts = ["make the circle green", "a red circle", "remove it", "two small blue squares above a ring", "combine"]
    images = [one, None, [two], None, [one, two]]
    options = {"height": 32, "width": 32, "output_type": "pt"}
    together = pipe(texts, image=images, seed=5, **options).images
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        alone = pipe(text, image=image, seed=5 + i, **options).images
        torch.testing.assert_close(together[i : i + 1], alone, **TOLERANCE)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pair = pipe(texts[1::2], generator=generators, **options).images
    alone = pipe(texts[3], generator=torch.Generator().manual_seed(1), **options).images
    torch.testing.assert_close(pair[1:], alone, **TOLERANCE)


def test_the_scheduler_of_the_pipeline_is_the_one_that_solves(trained: Trained, exported: Path, pipe: WeMMUPipeline):
    case = CASES["text to image, 32 px"]
    stock, shifted = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=1.5)
    try:
        pipe.scheduler = shifted
        drawn = pipe(case.text, height=32, width=32, seed=case.seed, output_type="pt").images
    finally:
        pipe.scheduler = stock
    torch.testing.assert_close(drawn, by_training(trained, case, shift=1.5), **TOLERANCE)
    assert not torch.allclose(drawn, by_training(trained, case), atol=1e-3)


def test_guidance_and_steps_of_a_call_go_before_those_of_training(pipe: WeMMUPipeline):
    options = {"image": noise_image(0), "height": 32, "width": 32, "seed": 0, "output_type": "pt"}
    usual = pipe("make it red", **options).images
    for change in ("image_guidance_scale", "instruction_guidance_scale", "num_inference_steps"):
        assert not torch.allclose(usual, pipe("make it red", **options, **{change: 5}).images, atol=1e-3), change
    assert torch.equal(usual, pipe("make it red", **options, t2i_guidance_scale=9.0).images)


def test_the_output_types_are_one_image(pipe: WeMMUPipeline):
    pil, pt, np = (
        pipe(["a", "b"], height=32, width=48, num_inference_steps=1, seed=0, output_type=kind).images
        for kind in ("pil", "pt", "np")
    )
    assert [p.size for p in pil] == [(48, 32)] * 2
    assert pt.shape == (2, 3, 32, 48)
    assert torch.equal(torch.from_numpy(np).permute(0, 3, 1, 2), pt)
    from_pil = torch.tensor(list(pil[1].getdata())).reshape(32, 48, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(from_pil, pt[1], atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 40}, "multiples of 16 px"),
        ({"width": 144}, "width is 144 px; the largest that this model generates is 128 px"),
        ({"height": 1.5}, "height is 1.5; valid: a whole number of px"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; valid: a whole number from 1"),
        ({"t2i_guidance_scale": float("nan")}, "t2i_guidance_scale is nan; valid: a number from -1000 to 1000"),
        ({"prompt": 3}, "prompt is of type int"),
        ({"prompt": ["a", None]}, r"prompt\[1\] is of type NoneType"),
        ({"seed": "a"}, "seed is 'a'; valid: a whole number"),
        ({"seed": 2**63}, "valid: a whole number, .* of 64 bits"),
        ({"seed": np.array(3)}, "valid: a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps is True; valid: a whole number from 1"),
        ({"num_inference_steps": "3"}, "num_inference_steps is '3'; valid: a whole number from 1"),
        ({"t2i_guidance_scale": 1e300}, r"t2i_guidance_scale is 1e\+300; valid: a number from -1000 to 1000"),
        ({"num_inference_steps": 10**9}, "valid: a whole number from 1 to 10000"),
        ({"t2i_guidance_scale": True}, "t2i_guidance_scale is True; valid: a number from -1000 to 1000"),
        ({"height": True}, "height is True; valid: a whole number of px"),
        ({"prompt": "a \udcff circle"}, "half a character"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "image: an image of shape .* is empty"),
        ({"image": Image.new("RGB", (0, 4))}, "image: an image of 0 x 4 px is empty"),
        ({"image": Image.open(BytesIO(TRUNCATED))}, "image: a PIL image cannot be read as an image: image file"),
        ({"generator": 3}, "generator is of type int"),
        ({"image": 3.5}, "image: an image cannot be of type float; valid: PIL image, path"),
        ({"image": np.full((4, 4, 3), 2.0)}, "image: an image of floats holds 2 to 2; valid: 0 to 1"),
        ({"output_type": "tensor"}, "valid choices: pil, pt, np, latent"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["a", "b"], "image": noise_image(0)}, "needs a list of 2 entries"),
        ({"prompt": ["a", "b"], "image": [noise_image(0)]}, "needs a list of 2 entries"),
        ({"image": "photo.png"}, "image: photo.png cannot be read as an image"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"prompt": ["a", "b"], "seed": [1]}, "2 prompts need 2 seeds"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_a_call_that_cannot_be_answered_says_why(pipe: WeMMUPipeline, arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": "a red circle"} | arguments)


def test_an_image_is_the_same_in_every_form_that_diffusers_takes(pipe: WeMMUPipeline, tmp_path: Path):
    image = noise_image(0)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    file = (tmp_path / "a.png").read_bytes()
    just_written = BytesIO()
    just_written.write(file)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = (
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        file,
        just_written,
        array,
        array / 255,
        tensor,
        tensor / 255,
    )
    images = pipe(
        ["make it red"] * len(forms), image=list(forms), seed=[np.int64(3)] * len(forms), output_type="pt"
    ).images
    assert len(images.unique(dim=0)) == 1
    assert torch.equal(
        pipe(None, image=image, seed=3, output_type="pt").images,
        pipe("", image=[image], seed=3, output_type="pt").images,
    )


def test_calls_beside_each_other_draw_what_they_draw_alone(pipe: WeMMUPipeline):
    def draw(seed: int, steps: int) -> Tensor:
        return pipe("a red circle", height=32, width=32, seed=seed, num_inference_steps=steps, output_type="pt").images

    cases = [(seed, steps) for seed in range(6) for steps in (2, 5)]
    alone = [draw(*case) for case in cases]
    with ThreadPoolExecutor(2) as threads:
        beside = list(threads.map(lambda case: draw(*case), cases))
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_another_kind_of_scheduler_is_refused(pipe: WeMMUPipeline):
    other = WeMMUPipeline(**pipe.components)
    other.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler.*must be a FlowMatchEulerDiscreteScheduler"):
        other("a red circle")


def test_a_pipeline_made_of_components_has_the_same_defaults(pipe: WeMMUPipeline):
    other = WeMMUPipeline(**pipe.components)
    assert {name: other.config[name] for name in _DEFAULTS} == {name: pipe.config[name] for name in _DEFAULTS}


def test_weights_that_are_no_numbers_draw_no_image(exported: Path):
    broken = WeMMUPipeline.from_pretrained(exported)
    broken.transformer.proj_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="infinite or NaN"):
        broken("a red circle", height=32, width=32, num_inference_steps=1)


def test_what_was_saved_again_opens_without_wemmu_being_named(pipe: WeMMUPipeline, exported: Path, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    for directory in (exported, tmp_path):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(directory)
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    draws = [p("a", height=32, width=32, seed=1, num_inference_steps=1, output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*draws)


def test_an_export_that_names_the_earlier_module_of_the_bridge_opens(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "earlier")
    index = tmp_path / "earlier" / "model_index.json"
    text = index.read_text().replace("wemmu.recipes.wemmu.component", "wemmu.models.component")
    assert "wemmu.models.component" in text
    index.write_text(text)
    for earlier in (
        WeMMUPipeline.from_pretrained(index.parent),
        DiffusionPipeline.from_pretrained(index.parent, trust_remote_code=True),
    ):
        assert type(earlier.bridge) is WeMMUBridge


def test_offloaded_components_draw_the_same(pipe: WeMMUPipeline, exported: Path):
    """Layer by layer, as `enable_sequential_cpu_offload` does it; here from the CPU to the CPU."""
    offloaded = WeMMUPipeline.from_pretrained(exported)
    for name in ("vlm", "bridge", "transformer", "vae"):
        cpu_offload(getattr(offloaded, name), execution_device=torch.device("cpu"))
    asked = {"prompt": "make it red", "image": noise_image(0), "seed": 1, "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(offloaded(**asked).images, pipe(**asked).images)


def test_the_hook_that_brings_the_vlm_is_called_once_for_each_call(exported: Path):
    """`enable_model_cpu_offload` waits for `vlm.forward`, which is never called."""
    brought = []

    class Brings(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            brought.append(module)
            return args, kwargs

    loaded = WeMMUPipeline.from_pretrained(exported)
    add_hook_to_module(loaded.vlm, Brings())
    loaded("a", height=32, width=32, num_inference_steps=1)
    assert brought == [loaded.vlm]
    assert set(loaded.model_cpu_offload_seq.split("->")) == {"vlm", "bridge", "transformer", "vae"}


def test_what_training_never_showed_is_drawn_with_a_warning(pipe: WeMMUPipeline):
    assert (pipe.config.world, pipe.config.resolutions) == ("shapes", [64])
    assert list(beyond("shapes", [32, 64], ["a red circle above a blue square"], (64, 64))) == []
    assert list(beyond(None, [1024], ["an astronaut"], (896, 1152))) == []
    words, size = beyond("shapes", [32, 64], ["a red astronaut on a dog"], (128, 128))
    assert words.endswith("never read: astronaut, dog")
    assert "trained at 32 px, 64 px; 128 x 128 px" in size


@pytest.mark.parametrize("change", ["lacks", "holds unknown"])
def test_a_bridge_that_is_not_whole_is_refused_by_name(exported: Path, tmp_path: Path, change: str):
    shutil.copytree(exported / "bridge", tmp_path / "bridge")
    tensors = load_file(exported / BRIDGE_FILE)
    name = "pathway.layers.1.mlp.up_proj.weight"
    if change == "lacks":
        del tensors[name]
    else:
        name = "pathway.layers.9.mlp.up_proj.weight"
        tensors[name] = torch.zeros(1)
    write_file(tensors, tmp_path / BRIDGE_FILE)
    with pytest.raises(ValueError, match=f"{change} {name}"):
        WeMMUBridge.from_pretrained(tmp_path / "bridge")
    # The same through the whole pipeline.
    for part in exported.iterdir():
        if part.name != "bridge":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(ValueError, match=f"{change} {name}"):
        WeMMUPipeline.from_pretrained(tmp_path)


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def test_a_vlm_of_another_shape_is_refused(exported: Path, pipe: WeMMUPipeline):
    parts = dict(pipe.components)
    bridge = WeMMUBridge.from_pretrained(exported / "bridge")
    layers = bridge.config.text_config["num_hidden_layers"]
    bridge.register_to_config(text_config={**bridge.config.text_config, "num_hidden_layers": layers + 1})
    with pytest.raises(ValueError, match=f"num_hidden_layers {layers + 1}, the one given has {layers}"):
        WeMMUPipeline(**parts | {"bridge": bridge})


def test_casting_leaves_the_rotary_frequencies_in_32_bits(exported: Path):
    """Those of the VLM and of the pathway, which must turn alike."""
    pipe = WeMMUPipeline.from_pretrained(exported)
    before, places = pipe.bridge.pathway.rotary.inv_freq.clone(), pipe.transformer.patch_embed.pos_embed.clone()
    pipe.to(torch.bfloat16)
    assert pipe.bridge.position_mlp.table.dtype == pipe.vlm.dtype == torch.bfloat16
    assert torch.equal(pipe.bridge.pathway.rotary.inv_freq, before)
    assert torch.equal(pipe.vlm.model.language_model.rotary_emb.inv_freq, before)
    assert pipe.vlm.model.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert torch.equal(pipe.transformer.patch_embed.pos_embed, places)


def test_a_bfloat16_export_without_the_vlm_replaces_an_earlier_one(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "export"
    out.mkdir()
    (out / "model_index.json").write_text(json.dumps({"_class_name": "WeMMUPipeline"}))
    (out / "vlm").mkdir()
    (out / "vlm" / "config.json").write_text("{}")
    (out / "parity.json").write_text('{"written": ["model_index.json", "parity.json", "vlm/config.json"]}')
    main(trained.folder, out=out, dtype=Dtype.BFLOAT16, without_vlm=True)
    assert not (out / "vlm").exists()
    assert list(tmp_path.iterdir()) == [out]
    with safe_open(out / BRIDGE_FILE, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    with pytest.raises(ValueError, match="does not contain the VLM"):
        WeMMUPipeline.from_pretrained(out)
    # The card's snippet runs.
    snippet = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(out)
    exec(snippet.replace(f'"{trained.run.backbones.vlm.name}"', repr(str(trained.run.backbones.vlm))), {})
    assert Path("image.png").is_file()
    loaded = WeMMUPipeline.from_pretrained(out, vlm=trained.model.vlm.vlm, torch_dtype=torch.bfloat16)
    trained_image = by_training(trained, CASES["text to image, 32 px"])
    case = CASES["text to image, 32 px"]
    drawn = loaded(case.text, height=32, width=32, seed=case.seed, output_type="pt").images
    # Computed in 16 bits, hence near and not equal.
    assert 1e-6 < (drawn - trained_image).abs().max() < 0.1


def test_an_export_that_differs_leaves_nothing_behind(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def damaged(directory: Path, single: str, tensors: dict[str, Stored], dtype: torch.dtype) -> None:
        """Writes a bridge of which one value is another."""
        if directory.name == "bridge":
            right = tensors["position_mlp.down.weight"]
            wrong = dataclasses.replace(right, read=lambda: right.read() + 1e-3)
            tensors = tensors | {"position_mlp.down.weight": wrong}
        write_component(directory, single, tensors, dtype)

    def unshifted(shift: float) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(shift=1.1 * shift)

    for target, attribute, wrong, words in (
        (
            write,
            "write_component",
            damaged,
            r"bridge has other values .* position_mlp\.down\.weight",
        ),
        (write, "FlowMatchEulerDiscreteScheduler", unshifted, "images differ by"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, wrong)
            with pytest.raises(SystemExit, match=words):
                main(trained.folder, out=tmp_path / "export")
        assert list(tmp_path.iterdir()) == []


def test_the_report_tells_the_hash_of_every_stored_tensor_and_what_was_compared(trained: Trained, exported: Path):
    report = json.loads((exported / "parity.json").read_text())
    weights, manifest = load_weights(trained.checkpoint)
    assert report["origin"]["frozen"] == manifest.frozen
    assert report["outputs"]["compared"]
    assert report["outputs"]["max_abs_difference"] <= report["outputs"]["bound"]
    assert report["tensors"].keys() == {"bridge", "transformer", "vae", "vlm"}
    for prefix, component in (("bridge.", "bridge"), ("dit.", "transformer")):
        expected = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        found = report["tensors"][component]
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            sha256 = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
            assert found[name] == {"shape": list(weight.shape), "dtype": "float32", "sha256": sha256}


def test_large_components_are_written_as_several_files_that_load_alike(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit = 1_500_000
    monkeypatch.setattr(stored, "LIMIT", limit)
    main(trained.folder, out=tmp_path / "export", forward=False)
    assert not json.loads((tmp_path / "export" / "parity.json").read_text())["outputs"]["compared"]
    for component in ("bridge", "transformer", "vae", "vlm"):
        files = list((tmp_path / "export" / component).glob("*-of-*.safetensors"))
        assert len(files) > 1
        assert max(file.stat().st_size for file in files) < limit + 20_000
    parts = WeMMUPipeline.from_pretrained(tmp_path / "export").components
    for name, component in (("bridge", trained.model.bridge), ("transformer", trained.model.dit)):
        expected = component.state_dict()
        for key, tensor in parts[name].state_dict().items():
            assert torch.equal(tensor, expected[key]), key
    for key, tensor in trained.model.vlm.vlm.state_dict().items():
        assert torch.equal(parts["vlm"].state_dict()[key], tensor), key


def test_averages_of_the_weights_are_taken_if_asked_for_and_there(trained: Trained, exported: Path, tmp_path: Path):
    (directory,) = (trained.folder / "stage3" / "checkpoints").iterdir()
    weights, _ = load_weights(directory)
    main(directory, out=tmp_path / "export", forward=False, ema=True)
    with safe_open(tmp_path / "export" / BRIDGE_FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), weights[f"bridge.{name}"] + 1), name
    assert "moving averages (EMA)" in (tmp_path / "export" / "README.md").read_text()
    assert json.loads((tmp_path / "export" / "parity.json").read_text())["ema"]
    run = load_stage(trained.folder / "stage3" / "config.yaml")
    for ema in (False, True):
        loaded = load_trained(run, directory, ema).model
        assert torch.equal(loaded.bridge.position_mlp.table, weights["bridge.position_mlp.table"] + ema)
    keeps = run.stage.model_copy(update={"optimizer": run.stage.optimizer.model_copy(update={"ema_decay": 0.9})})
    assert (keeps.averages(None), keeps.averages(False), run.stage.averages(None)) == (True, False, False)
    for act in (
        lambda: main(trained.folder, out=tmp_path / "none", ema=True),
        lambda: main(trained.folder, ship=tmp_path / "none", ema=True),
        lambda: open_source(trained.folder, ema=True),
    ):
        with pytest.raises((SystemExit, ConfigError), match=r"holds no moving average .* --no-ema"):
            act()
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="is an export, which has one set of weights"):
        open_source(exported, ema=True)


def test_a_pipeline_starts_a_stage_with_the_bits_of_the_checkpoint(trained: Trained, exported: Path, tmp_path: Path):
    main(exported, ship=tmp_path / "shipped", dtype=Dtype.FLOAT32)
    weights, manifest = load_weights(tmp_path / "shipped")
    expected, original = load_weights(trained.checkpoint)
    assert differing(weights, expected) == []
    assert (manifest.frozen, manifest.step, manifest.trained) == (original.frozen, original.step, [])
    copy = shutil.copytree(exported, tmp_path / "copy")
    with (copy / BRIDGE_FILE).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    with pytest.raises(SystemExit, match="is damaged"):
        main(copy, ship=tmp_path / "other")
    (copy / "parity.json").unlink()
    with pytest.raises(SystemExit, match=r"has no readable parity\.json"):
        main(copy, ship=tmp_path / "other")
    with pytest.raises(SystemExit, match="is already a pipeline"):
        main(exported, out=tmp_path / "other")


def test_shipped_weights_start_a_stage(trained: Trained, tmp_path: Path):
    main(trained.checkpoint, ship=tmp_path / "shipped")
    run = trained.run
    model, _ = build_model(run.backbones, run.recipe.bridge, seed=0)
    identities = {"vlm": identity(run.backbones.vlm), "vae": identity(run.backbones.vae), "dit": ""}
    start_from(tmp_path / "shipped", startable(model), identities)
    expected = dict(trained.model.named_parameters())
    for name, parameter in model.named_parameters():
        trains = name.startswith(("bridge.", "dit."))
        assert torch.equal(parameter, expected[name].half().float() if trains else expected[name]), name


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("inf"), Dtype.FLOAT32, "cannot be used: not finite are bridge."),
        (float("nan"), Dtype.FLOAT16, "cannot be used: not finite are bridge."),
        (7e4, Dtype.FLOAT16, " holds values up to 7e+04, beyond the range of float16; give another --dtype"),
    ],
)
def test_no_infinity_is_exported_or_shipped(
    value: float,
    dtype: Dtype,
    told: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """Neither one that a checkpoint holds, as earlier versions wrote them, nor one that the smaller type makes."""
    weights, manifest = load_weights(trained.checkpoint)
    weights[next(name for name in weights if name.startswith("bridge."))].view(-1)[0] = value
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    stage = tmp_path / "stage2"
    stage.mkdir()
    shutil.copy(trained.folder / "stage2" / "config.yaml", stage)
    origin = Origin("stage2", manifest.seed, manifest.resolution, manifest.frozen)
    with monkeypatch.context() as patch:
        patch.setattr(store, "check_finite", lambda *_: None)
        saved = store.save(stage / "checkpoints", TrainState(weights, zeros, zeros, 2, {}), {}, origin)
    for options in ({"out": tmp_path / "out", "forward": False}, {"ship": tmp_path / "shipped"}):
        with pytest.raises(SystemExit) as caught:
            main(saved, dtype=dtype, **options)
        assert caught.value.code == FINAL
        assert told in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "shipped" / "manifest.json").exists()
