"""What `pip install .` puts elsewhere can do all that a checkout can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Every file that a chain of jobs names, on this machine and on a cluster, and that the converter there begins.
NAMES = """
import runpy, sys
from pathlib import Path
import launcher.plan
from launcher.cluster import Cluster
from launcher.submit import submissions
from wemmu.config import ConfigError, load_curriculum
from wemmu.config.shipped import configs
root, elsewhere = map(Path, sys.argv[1:])
assert Path(launcher.plan.__file__).is_relative_to(elsewhere), launcher.plan.__file__
curriculum = load_curriculum(root / "configs/shapes/curriculum.yaml")
jobs = launcher.plan.chain(curriculum, Path("run"))
cluster = Cluster.model_validate({"name": "here", "ranks_per_node": 1})
named = [Path(word) for job in jobs for word in job.command if word.endswith(".py")]
named += [one.script for one in submissions(jobs, Path("run"), cluster)]
assert len(named) > len(jobs)
assert [file for file in named if not (file.is_file() and file.is_relative_to(elsewhere))] == []
assert (launcher.plan.HOME / "slurm" / "job.sh").is_file()
assert (launcher.plan.HOME / "tools" / "wandb_sync.py").is_file()
# The shipped configs work in any folder, by either name, and find the miniature's files. They write into that folder.
for name in ("shapes/demo.yaml", "configs/shapes/uae.yaml", "examples/my-images.yaml"):
    shipped = load_curriculum(Path(name))
    assert shipped.backbones.vlm == elsewhere / "launcher/home/assets/shapes/vlm", shipped.backbones.vlm
    assert (shipped.backbones.vlm / "model.safetensors").is_file()
    assert shipped.data.shards.parent == Path("runs"), shipped.data.shards
assert (shipped.sampling.prompts[0].text, shipped.stages[0].start.name) == ("a ball", "stage2")
Path("mine.yaml").write_text((launcher.plan.HOME / "configs/examples/my-images.yaml").read_text("utf-8"), "utf-8")
assert load_curriculum(Path("mine.yaml")) == shipped
assert {str(file.relative_to(root / "configs")) for file in root.glob("configs/*/*.yaml")} == {
    name for name, _, _ in configs()
}
try:
    load_curriculum(Path("shapes/dmeo.yaml"))
except ConfigError as error:
    assert "there is no shapes/dmeo.yaml; did you mean shapes/demo.yaml?" in str(error), error
try:
    sys.argv = ["convert_ckpt.py", "--help"]
    runpy.run_path(str(launcher.plan.HOME / "tools" / "convert_ckpt.py"), run_name="__main__")
except SystemExit as end:
    assert end.code == 0
import wemmu.__main__
assert wemmu.__main__.load("export").name == "main"
import tools.export.replacing
from wemmu.report.page import Page, html
assert "--page" in html(Page("title", "about", []))
assert Path(tools.__file__).is_relative_to(elsewhere)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as they are installed."""
    home = tmp_path_factory.mktemp("site")
    build = ["egg_info", "--egg-base", str(home), "build_py", "--build-lib", str(home / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True)
    return home / "lib"


def test_an_installation_has_every_file_that_the_jobs_need(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text(NAMES, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, tmp_path / "names.py", ROOT, installed]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Nothing lies beside the packages under a name that others may have, too.
    assert sorted(entry.name for entry in installed.iterdir()) == ["data_pipeline", "launcher", "wemmu"]
