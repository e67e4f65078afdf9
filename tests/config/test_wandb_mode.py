"""Whether a run is uploaded follows from the config, WANDB_MODE and whether there is a key, in this order."""

import errno
from pathlib import Path

import pytest

from wemmu.config.schema import Logging
from wemmu.config.wandb_mode import wandb_mode

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key would be; there is none."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_without_a_key_a_run_is_offline_and_with_one_online(netrc: Path, monkeypatch: pytest.MonkeyPatch):
    assert wandb_mode(Logging()).name == "offline"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_mode(Logging()).name == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    found = wandb_mode(Logging())
    assert found.name == "online"
    assert "WANDB_API_KEY" in found.reason
    assert KEY not in found.reason


@pytest.mark.parametrize("name", ["online", "offline", "disabled"])
def test_the_config_overrules_the_environment_which_overrules_the_key(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", name)
    assert wandb_mode(Logging()).name == name
    monkeypatch.setenv("WANDB_MODE", "online" if name != "online" else "offline")
    assert wandb_mode(Logging(wandb=name)).name == name


def test_a_home_that_is_not_there_or_cannot_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def closed(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.delenv("NETRC")
    with monkeypatch.context() as patch:
        # As of another user; root, who runs tests in containers, may read everything.
        patch.setattr(Path, "stat", closed)
        found = wandb_mode(Logging())
    assert found.name == "offline"
    assert found.reason.startswith("the netrc file cannot be read (Permission denied: ")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    found = wandb_mode(Logging())
    assert found == ("offline", "this user has no home directory for a netrc file")


def test_what_is_wrong_leaves_a_run_offline_and_says_why(netrc: Path, monkeypatch: pytest.MonkeyPatch):
    netrc.write_text(f"machine api.wandb.ai login user {KEY} {KEY}\n")
    found = wandb_mode(Logging())
    assert found == ("offline", "the netrc file cannot be parsed")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    assert wandb_mode(Logging()).name == "offline"
    assert "'sometimes'" in wandb_mode(Logging()).reason
