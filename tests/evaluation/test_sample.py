"""The command line for images, as far as it goes without a model."""

from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.fakes import write_run
from wemmu.command_line import UsageError
from wemmu.config import ConfigError, Task
from wemmu.config.checkpoints import stage_folder
from wemmu.config.schema import Sampling
from wemmu.sample import main, open_image, parse_size, side_by_side, unused
from wemmu.source import SampleOptions, choose_device, open_source, save_image, settings_of
from wemmu.ui.work import read_image


@pytest.mark.parametrize(("text", "size"), [(None, None), ("64", (64, 64)), ("64x96", (64, 96))])
def test_sizes(text: str | None, size: tuple[int, int] | None):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "64x", "x64", "64X96", "64x0", "-64", "a", "64x64x64"])
def test_bad_size_is_refused(text: str):
    with pytest.raises(UsageError, match="valid choices"):
        parse_size(text)


def test_newest_finished_stage_is_taken(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert stage_folder(run) == run / "stage4"
    earlier = (run / "stage4" / "checkpoints" / "step_00000100").rename(
        run / "stage4" / "checkpoints" / "step_00000060"
    )
    manifest = (earlier / "manifest.json").read_text()
    (earlier / "manifest.json").write_text(manifest.replace('"step": 100', '"step": 60'))
    assert stage_folder(run) == run / "stage1"
    (run / "stage1" / "checkpoints" / "step_00000100" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"no stage of .* is finished; name one .*stage4"):
        stage_folder(run)


def test_an_invalid_config_of_one_stage_is_named_and_keeps_no_other_from_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = write_run(tmp_path / "run")
    (run / "stage1" / "config.yaml").write_text("steps: many")
    assert stage_folder(run) == run / "stage4"
    assert f"skipping {run / 'stage1'}: the config" in capsys.readouterr().err


def test_other_folders_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="valid choices: a run folder"):
        open_source(tmp_path)
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"did you mean {run / 'stage4'}[?]"):
        open_source(run / "stgae4")
    with pytest.raises(ConfigError, match=f"did you mean {run}[?]"):
        open_source(tmp_path / "rnu")


def test_half_an_export_is_named(tmp_path: Path):
    """As a copy leaves it that was interrupted."""
    for name, content in (("empty", "{}"), ("torn", '{"_class_name": "WeMMU'), ("bare", '{"_class_name": "P"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(content)
        with pytest.raises(ConfigError, match=f"{name} cannot be loaded as a pipeline: .*copy all"):
            open_source(tmp_path / name)


def test_unreadable_image_is_named(tmp_path: Path):
    (tmp_path / "words.png").write_text("no image")
    for name, reason in (("words.png", "none of JPEG, PNG"), ("absent.png", "No such file")):
        for read in (open_image, read_image):
            with pytest.raises(UsageError, match=f"{name} cannot be read as an image: .*{reason}"):
                read(tmp_path / name)
    # The page does not name the folder of its server.
    with pytest.raises(UsageError, match=r"^words\.png cannot"):
        read_image(tmp_path / "words.png")


def test_bad_input_ends_in_one_sentence(tmp_path: Path):
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(SystemExit, match="2 --image were given without --prompt"):
        main(tmp_path, tmp_path / "out.png", image=[file, file], prompt="", size=None)
    with pytest.raises(SystemExit, match=r"--out .* has no image format that can be written"):
        main(tmp_path, tmp_path / "out", image=[], prompt="a red circle", size=None)
    # Pillow reads these, and fails when it is to write one: before anything is drawn.
    with pytest.raises(SystemExit, match=r"--out .*a.psd has no image format that can be written"):
        main(tmp_path, tmp_path / "a.psd", image=[], prompt="a red circle", size=None)
    with pytest.raises(SystemExit, match="--guidance nan is not a weight"):
        main(tmp_path, tmp_path / "a.png", image=[], prompt="a red circle", size=None, guidance=float("nan"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is not a writable folder"):
        main(tmp_path, tmp_path / "file" / "a.png", image=[], prompt="a red circle", size=None)
    with pytest.raises(UsageError, match="--device nonsense cannot be used"):
        choose_device("nonsense")


@pytest.mark.parametrize(
    ("task", "weights"),
    [
        (Task.T2I, {"t2i": 5.0, "image": 2.0}),
        (Task.EDIT, {"instruction": 5.0, "image": 2.0}),
        (Task.RECONSTRUCTION, {"image": 5.0}),
        (Task.MULTI_EDIT, {"multi": 5.0, "image": 2.0}),
    ],
)
def test_guidance_goes_to_the_rule_of_the_task(task: Task, weights: dict[str, float]):
    wish = SampleOptions("", (), None, 0, 1, None, guidance=5.0, image_guidance=2.0)
    assert wish.weights(task) == weights


def test_guidance_that_is_not_given_is_the_models_own():
    assert SampleOptions("", (), None, 0, 1, None, None, None).weights(Task.EDIT) == {}
    assert SampleOptions("", (), None, 0, 1, None, None, 2.0).weights(Task.RECONSTRUCTION) == {"image": 2.0}


def test_of_two_processes_that_look_for_a_new_name_each_gets_its_own(tmp_path: Path):
    with unused(tmp_path / "sample.png") as first, unused(tmp_path / "sample.png") as second:
        assert [first.name, second.name] == ["sample.png", "sample-2.png"]
    with pytest.raises(OSError, match="full"), unused(tmp_path / "sample.png"):
        raise OSError("the disk is full")
    assert sorted(tmp_path.iterdir()) == [second, first]


def test_images_stand_side_by_side():
    both = side_by_side([Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")])
    assert both.size == (192, 64)
    assert both.getpixel((95, 0)) == (255, 0, 0)
    assert both.getpixel((96, 0)) == (0, 0, 255)


def test_a_png_carries_its_settings_and_its_pixels_stay(tmp_path: Path):
    image, settings = (
        Image.effect_noise((8, 8), 50),
        {"prompt": "a \u00e9 \u4e2d", "seed": 2**62, "guidance": {"full": 1.5}},
    )
    save_image(image, tmp_path / "a.png", settings)
    written = Image.open(tmp_path / "a.png")
    assert settings_of(written) == settings
    assert written.tobytes() == image.tobytes()
    save_image(image, tmp_path / "a.webp", settings)
    assert settings_of(Image.open(tmp_path / "a.webp")) is None


@pytest.mark.parametrize(("guidance", "words"), [(1e6, r"1000000\.0"), (1e300, r"1e\+300")])
def test_a_setting_beyond_what_a_config_may_say_is_named_in_the_words_of_the_command(
    guidance: float, words: str
) -> None:
    options = SampleOptions("a red circle", (), None, 0, 1, None, guidance, None)
    with pytest.raises(UsageError, match=rf"guidance is {words}: input should be less than or equal to 1000"):
        options.sampling(Task.T2I, Sampling())
