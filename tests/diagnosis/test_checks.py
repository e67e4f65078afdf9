"""Each problem of a machine provoked, for real or by a stand-in, and told with its remedy."""

import errno
import os
import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from launcher.lock import locked
from tests.planning.worlds import MINIATURE
from wemmu.config import Curriculum, load_curriculum
from wemmu.diagnosis import devices, host, processes, services, software
from wemmu.diagnosis.findings import Finding, examine
from wemmu.locks import LockedError
from wemmu.training.hold import held

KEY = "f00dfeed" * 5


def is_problem(found: Finding, *words: str) -> None:
    assert found.status == "problem", found
    assert found.remedy
    for word in words:
        assert word in f"{found.found} {found.remedy}"


def put(root: Path, file: str, text: str = "") -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def program(folder: Path, name: str, body: str) -> None:
    put(folder, name, f"#!/bin/sh\n{body}\n").chmod(0o755)


def test_an_apex_that_is_not_nvidias_is_to_be_uninstalled(packages: Path):
    put(packages, "apex/__init__.py", "raise RuntimeError('imported')")
    is_problem(devices.apex(), "another project", "uninstall it", str(packages))


def test_nvidias_apex_is_known_by_its_parts_and_must_load(packages: Path):
    put(packages, "apex/__init__.py")
    put(packages, "apex/normalization/__init__.py")
    broken = put(packages, "apex/optimizers/__init__.py", "raise ImportError('undefined symbol')")
    is_problem(devices.apex(), "undefined symbol", "uninstall it")
    broken.write_text("from . import fused")
    put(packages, "apex/optimizers/fused.py")
    assert devices.apex().status == "ok"


def test_fused_kernels_and_attention_of_torch_run_here():
    assert devices.fused_adamw().status == "ok"
    assert devices.attention().status == "ok"
    assert "math" in devices.attention().found


def test_a_driver_that_torch_cannot_use_is_a_problem(programs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program(programs, "nvidia-smi", "echo 450.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    is_problem(devices.gpus(), "450.1", "CUDA 13.0", "CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    is_problem(devices.gpus(), "CPU build")
    program(programs, "nvidia-smi", "exit 9")
    assert devices.gpus().status == "warning"


def test_versions_are_held_against_the_installed_distributions_own_ranges(monkeypatch: pytest.MonkeyPatch):
    assert "transformers 4." in software.libraries().found
    chief = [name for name in software.CHIEF if name != "transformers"]
    wanted = [*chief, "transformers>=99", "nowhere-to-be-found>=1", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(software.metadata, "requires", lambda _: wanted)
    is_problem(software.libraries(), ">=99 is needed", "make install")
    is_problem(software.libraries(), "nowhere-to-be-found: not installed")
    assert "pytest" not in software.libraries().found
    monkeypatch.setattr(software.metadata, "requires", lambda _: wanted[1:])
    is_problem(software.libraries(), "torch: not required", "older state")


def test_a_checkout_that_is_not_installed_is_one_problem(monkeypatch: pytest.MonkeyPatch):
    real = software.metadata.Distribution.from_name

    def without_wemmu(name: str) -> object:
        if name == "wemmu":
            raise software.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(software.metadata.Distribution, "from_name", without_wemmu)
    found = [examine(*call) for call in software.calls() if call[0] is not software.torchvision_operators]
    (problem,) = (one for one in found if one.status == "problem")
    is_problem(problem, "wemmu itself is not installed", "make install")


def test_shared_memory_that_is_too_small_is_a_problem(tmp_path: Path):
    is_problem(host.shared_memory(tmp_path, least=1e18), "--shm-size")
    assert host.shared_memory(tmp_path, least=1).status == "ok"
    assert host.shared_memory(tmp_path / "nowhere").status == "ok"


def test_limits_and_threads_that_are_off_are_warnings(monkeypatch: pytest.MonkeyPatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = host.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.status == "warning"
    assert "ulimit -n 4096" in found.remedy
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert host.cores().status == "warning"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert host.cores().status == "ok"


def test_a_file_system_with_another_clock_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert host.clock(tmp_path / "not/yet").status == "ok"
    assert list(tmp_path.iterdir()) == []
    real = time.time
    monkeypatch.setattr(host.time, "time", lambda: real() + 3600)
    found = host.clock(tmp_path)
    assert found.status == "warning"
    assert "3600" in found.found or "3599" in found.found


def test_a_file_system_without_locks_is_a_problem_and_stops_whoever_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As Lustre is without its mount option."""
    assert host.file_locks(tmp_path / "not/yet").status == "ok"
    assert list(tmp_path.iterdir()) == []

    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    is_problem(host.file_locks(tmp_path), "Function not implemented", "flock", "another file system")
    for hold in (locked, held):
        with pytest.raises(LockedError, match=f"{tmp_path}/.* cannot be locked .*no file locks"), hold(tmp_path):
            pass


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="NCCL works here")
def test_ranks_that_do_not_meet_are_a_problem():
    is_problem(processes.process_group("gloo", timeout_s=0.2), "within 0.2 s", "GLOO_SOCKET_IFNAME")
    is_problem(processes.process_group("nccl", timeout_s=170), "ended with code")


def test_a_slurm_that_hangs_or_refuses_is_a_problem(programs: Path):
    program(programs, "sinfo", "sleep 600")
    is_problem(services.slurm(timeout_s=0.5), "did not answer within 0.5 s", "scontrol ping")
    program(programs, "sinfo", '[ "$1" = --version ] && echo slurm 23.11 && exit\necho refused >&2; exit 1')
    is_problem(services.slurm(60), "slurm 23.11", "refused")
    program(programs, "sinfo", '[ "$1" = --version ] && echo slurm 23.11 && exit\necho gpu up; echo old down')
    assert services.slurm(60) == Finding("Slurm", "ok", "slurm 23.11, partitions: gpu")


def test_no_slurm_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert services.slurm().status == "ok"


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Curriculum:
    """A curriculum that logs online, and a home without a key."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return load_curriculum(MINIATURE, ["logging.wandb=online"])


def test_a_wandb_key_is_found_and_never_told(online: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert services.wandb(None).status == "ok"
    is_problem(services.wandb(online), "wandb login")
    # A line that a parser's message would quote.
    put(tmp_path, "netrc", f"machine api.wandb.ai login user {KEY} {KEY}\n")
    is_problem(services.wandb(online), "cannot be parsed")
    assert KEY not in repr(services.wandb(online))
    put(tmp_path, "netrc", f"machine api.wandb.ai login user password {KEY}\n")
    assert services.wandb(online) == Finding("W&B", "ok", "online; key in netrc")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert services.wandb(online) == Finding("W&B", "ok", "online; key in WANDB_API_KEY")
