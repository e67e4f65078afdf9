"""What a command refuses, it refuses before it reads weights: here there are none, and nothing says so."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tools.convert_ckpt import Dtype
from tools.convert_ckpt import main as export
from wemmu.command_line import UsageError
from wemmu.config import dump, load_curriculum
from wemmu.config.checkpoints import MANIFEST, check_adapters, check_averages
from wemmu.evaluate import main as evaluate
from wemmu.sample import main as sample
from wemmu.ui.__main__ import _is_loopback, check_address
from wemmu.ui.__main__ import main as ui

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A finished stage, of whose checkpoint the manifest alone is left."""
    run = load_curriculum(ROOT / "configs/shapes/curriculum.yaml").stage_run("stage2")
    stage = tmp_path / "run" / "stage2"
    checkpoint = stage / "checkpoints" / f"step_{run.stage.steps:08d}"
    checkpoint.mkdir(parents=True)
    dump(run, stage / "config.yaml")
    facts = {"format": 1, "step": run.stage.steps, "stage": "stage2", "seed": 0, "resolution": 64, "frozen": {}}
    inside = {"tensors": {}, "trained": [], "files": {"state/a.distcp": "0"}, "libraries": {}}
    (checkpoint / "manifest.json").write_text(json.dumps(facts | inside))
    return stage


def refused(capsys: pytest.CaptureFixture[str], command: Any, *words: Any, **options: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        command(*words, **options)
    assert caught.value.code in (2, 78)
    return capsys.readouterr().err


def test_averages_that_a_checkpoint_lacks(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command, options in (
        (sample, {"prompt": "a red circle", "out": tmp_path / "image.png"}),
        (evaluate, {"prompts": 1}),
        (evaluate, {"benchmark": "shapes"}),
        (export, {"out": tmp_path / "out"}),
        (export, {"ship": tmp_path / "out"}),
        (export, {"adapters": tmp_path / "out"}),
    ):
        assert "holds no moving average" in refused(capsys, command, damaged, ema=True, **options), options
    # Else it is the damage that is refused.
    assert "is missing" in refused(capsys, export, damaged, ship=tmp_path / "out")


def test_a_device_that_is_not_there(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command, options in ((sample, {"prompt": "a", "out": tmp_path / "image.png"}), (evaluate, {"prompts": 1})):
        assert "--device npu7 cannot be used" in refused(capsys, command, damaged, device="npu7", **options)


def test_an_address_on_which_the_page_cannot_listen(damaged: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capsys, ui, damaged, port=port)
    assert f"--host 127.0.0.1 --port {port} cannot be listened on" in said
    # An address for documentation, RFC 5737.
    assert "--host 192.0.2.1 cannot be listened on" in refused(capsys, ui, damaged, host="192.0.2.1")
    for host in ("127.0.0.1", "localhost", "[127.0.0.1]"):
        check_address(host, None)
        assert _is_loopback(host)


def test_every_address_of_a_name_must_be_listened_on(monkeypatch: pytest.MonkeyPatch):
    resolve = socket.getaddrinfo

    def both(_: str, *args: Any, **kwargs: Any) -> list:
        return [*resolve("127.0.0.1", *args, **kwargs), *resolve("192.0.2.1", *args, **kwargs)]

    # A name with two addresses, which no machine of the tests has.
    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(UsageError, match=r"--host two\.example cannot be listened on"):
        check_address("two.example", None)


@pytest.mark.parametrize(
    ("option", "value", "targets"),
    [
        ("dtype", Dtype.FLOAT16, ("adapters", "checkpoint")),
        ("without_vlm", True, ("ship", "adapters", "checkpoint")),
        ("forward", False, ("ship", "adapters", "checkpoint")),
        ("rename", ["a=b"], ("out", "ship", "adapters")),
        ("ema", False, ("checkpoint",)),
    ],
)
def test_an_option_without_effect_on_the_target_of_an_export(
    option: str,
    value: Any,
    targets: tuple[str, ...],
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    for target in targets:
        stage = {"stage": damaged} if target == "checkpoint" else {}
        said = refused(capsys, export, damaged, **{target: tmp_path / "out", option: value}, **stage)
        assert f"--{option.replace('_', '-')}" in said
        assert f"has no effect with --{target}; it is for --" in said
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_stage_without_and_a_rule_that_is_none(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "holds no adapters (recipe.lora)" in refused(capsys, export, damaged, adapters=tmp_path / "out")
    said = refused(capsys, export, tmp_path, checkpoint=tmp_path / "out", stage=damaged, rename=["model"])
    assert "--rename 'model' is not OLD=NEW" in said


def test_a_manifest_that_cannot_be_read_says_nothing_of_averages_and_adapters(tmp_path: Path):
    """Whoever reads it says what is wrong with it."""
    (tmp_path / MANIFEST).write_text('{"ema": tr')
    check_averages(tmp_path, True)
    check_adapters(tmp_path)


def test_guidance_that_a_request_does_not_use(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given: dict[str, Any] = {"out": tmp_path / "image.png"}
    assert "--image-guidance is for" in refused(capsys, sample, damaged, prompt="a", image_guidance=2.0, **given)
    assert "--guidance has nothing to weight" in refused(capsys, sample, damaged, guidance=2.0, **given)
