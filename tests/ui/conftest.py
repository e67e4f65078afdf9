"""A page in a browser: a run of the miniature with the shipped weights, its export, and a Chromium that is driven."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tools.convert_ckpt import main as convert
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.state import TrainState
from wemmu.config import dump, load_curriculum

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets" / "shapes"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: stage2 and stage4 of the shipped weights, and the export of stage4."""
    folder = tmp_path_factory.mktemp("page") / "run"
    curriculum = load_curriculum(ROOT / "configs/shapes/curriculum.yaml")
    for name in ("stage2", "stage4"):
        config = curriculum.stage_run(name)
        (folder / name).mkdir(parents=True)
        dump(config, folder / name / "config.yaml")
        manifest = json.loads((ASSETS / name / "manifest.json").read_text())
        (file,) = manifest["files"]
        weights = {n: w.float() for n, w in load_file(ASSETS / name / file).items()}
        moments = {n: torch.zeros_like(w) for n, w in weights.items()}
        store.save(
            folder / name / "checkpoints",
            TrainState(weights, moments, moments, config.stage.steps, {}),
            {},
            Origin(name, 0, config.stage.resolution, manifest["frozen"]),
        )
    convert(folder, folder / "export", forward=False)
    return folder


@pytest.fixture(scope="session")
def address(run: Path) -> Iterator[str]:
    """The page of the export."""
    with page_of(run / "export") as address:
        yield address


@contextmanager
def page_of(source: Path) -> Iterator[str]:
    """The address of a page that the command serves."""
    command = [sys.executable, "-m", "wemmu", "ui", source]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+/)", line)
        assert found, line
        yield found[1]
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Skips where there is no Chromium; fails there if WEMMU_REQUIRE_BROWSER is set."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        if os.environ.get("WEMMU_REQUIRE_BROWSER"):
            pytest.fail("WEMMU_REQUIRE_BROWSER is set, but there is no chromium or no chromedriver")
        pytest.skip("no Chromium here; Debian has it: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1400"):
        options.add_argument(argument)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.downloads = downloads
    yield opened
    opened.quit()
