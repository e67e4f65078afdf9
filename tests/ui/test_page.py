"""The page in a real browser: what a visitor does, and what comes out."""

import json
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from wemmu.pipeline import WeMMUPipeline
from wemmu.shapes.render import render
from wemmu.shapes.scene import Object, Scene
from wemmu.source import settings_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]
# Seconds; a loaded machine is slow.
PATIENCE = 120
PROMPT = "a red circle at the top left and a blue square at the bottom right"
SCENE = Scene("white", (Object(0, "circle", "red", "large"), Object(3, "square", "blue", "large")))


class Visitor:
    """Uses the page as a person does."""

    def __init__(self, chrome: Chrome, address: str):
        self.chrome = chrome
        chrome.get(address)
        self.until(lambda: self.all("#generate:not([disabled])"))

    def until(self, condition):
        wait = WebDriverWait(self.chrome, PATIENCE, 0.1, [StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def words(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def click(self, selector: str, number: int = 0) -> None:
        element = self.until(lambda: self.all(selector)[number : number + 1])[0]
        self.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def type(self, selector: str, text: str) -> None:
        def typed() -> bool:
            """A page that is still being built forgets what was typed."""
            element = self.all(selector)[0]
            # By keys, for the page does not notice `clear()`.
            element.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)
            time.sleep(0.5)
            return self.all(selector)[0].get_attribute("value") == text

        self.until(lambda: self.all(selector))
        self.until(typed)

    def prompt(self, text: str) -> None:
        self.type("#prompt textarea", text)

    def upload(self, *files: Path) -> None:
        self.all("#images input[type=file]")[0].send_keys("\n".join(map(str, files)))
        self.until(lambda: len(self.all("#images button img")) >= len(files))

    def label(self, text: str) -> None:
        """Wait until the button says what it will do."""
        self.until(lambda: self.words("#generate") == [text])

    def verdicts(self) -> list[str]:
        """Start, and wait for the finished images."""
        self.click("#generate")
        self.until(lambda: not self.all("#results .verdict"))
        self.until(lambda: self.all("#results .verdict") and not self.all("#results .progress"))
        return self.words("#results .verdict")

    def fails(self, words: str) -> None:
        """Start, and wait for this error."""
        self.click("#generate")
        self.until(lambda: any(words in error for error in self.words("#results .error")))


@pytest.fixture
def visitor(chromium: Chrome, address: str) -> Visitor:
    return Visitor(chromium, address)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    render(SCENE, 64).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_a_prompt_becomes_images_which_form_are_judged_and_are_downloaded_with_their_settings(
    visitor: Visitor, run: Path
):
    visitor.prompt(PROMPT)
    visitor.click("#generate")
    visitor.until(lambda: visitor.all("#results img.forming"))
    assert visitor.words("#results .progress")[0].startswith("stage4: step")
    visitor.until(lambda: len(visitor.all("#results .verdict")) == 4)
    assert visitor.words("#results .verdict").count("\N{CHECK MARK} as asked") >= 3
    visitor.click("#results a[download]", 2)
    file = visitor.chrome.downloads / "stage4-seed-2.png"
    visitor.until(file.exists)
    downloaded = Image.open(file)
    settings = settings_of(downloaded)
    assert (settings["prompt"], settings["seed"], settings["stage"]) == (PROMPT, 2, "stage4")
    # What the settings say makes the same image again.
    pipe = WeMMUPipeline.from_pretrained(run / "export")
    again = pipe(PROMPT, seed=2, num_inference_steps=settings["steps"], solver=settings["solver"]).images[0]
    assert max(abs(a - b) for a, b in zip(again.tobytes(), downloaded.convert("RGB").tobytes(), strict=True)) <= 2


def test_an_uploaded_image_is_edited_and_the_result_is_edited_further(visitor: Visitor, image: Path):
    visitor.upload(image)
    visitor.label("Reconstruct")
    visitor.prompt("make the circle green")
    visitor.label("Edit")
    assert "\N{CHECK MARK} as asked" in visitor.verdicts()
    # Its first image becomes the input.
    visitor.click("#results button[data-use]")
    visitor.prompt("")
    visitor.label("Reconstruct")
    assert visitor.verdicts().count("\N{CHECK MARK} as asked") >= 3


def test_errors_are_sentences_and_the_page_goes_on(visitor: Visitor, image: Path, tmp_path: Path):
    visitor.prompt(PROMPT)
    visitor.click("#settings > button")
    visitor.type("#size textarea, #size input", "63")
    visitor.fails("Height and width must be multiples of 16 px, got (63, 63).")
    visitor.type("#size textarea, #size input", "wide")
    visitor.fails("is not a size; valid choices")
    visitor.prompt(f"{PROMPT} on a beach")
    visitor.type("#size textarea, #size input", "64")
    visitor.verdicts()
    assert visitor.words("#results .note") == ["The model knows only the shapes world and has never read: beach."]
    visitor.prompt("")
    render(SCENE, 64).save(tmp_path / "second.png")
    visitor.upload(image, tmp_path / "second.png")
    visitor.label("Combine")
    visitor.fails("2 input images were given without words; say what to do with them.")


def test_stages_are_compared_and_a_scene_is_built_by_clicking(visitor: Visitor):
    visitor.click("#scene > button")
    visitor.click("#board [aria-label='bottom right: large blue square']")
    visitor.until(lambda: visitor.all("#board [aria-label='bottom right: large green triangle']"))
    visitor.click("#board [aria-label='background black']")
    visitor.until(lambda: visitor.all("#board [aria-label='background black'][aria-pressed=true]"))
    visitor.click("#as-prompt")
    field = visitor.all("#prompt textarea")[0]
    scene = "a large red circle at the top left and a large green triangle at the bottom right on a black background"
    visitor.until(lambda: field.get_attribute("value") == scene)
    visitor.click("#stages label")
    assert len(visitor.verdicts()) == 8
    headings = visitor.words("#results h3")
    assert [heading.split()[0] for heading in headings] == ["stage2", "stage4"]
    assert headings[1].endswith(("3 of 4 as asked", "4 of 4 as asked"))


def test_stop_ends_a_request(visitor: Visitor):
    visitor.prompt(PROMPT)
    visitor.click("#settings > button")
    visitor.type("#count input[type=number]", "16")
    visitor.type("#steps input[type=number]", "100")
    visitor.click("#generate")
    visitor.until(lambda: visitor.all("#results img.forming"))
    visitor.click("#stop")
    # The model is free again long before the 100 steps would be over.
    visitor.type("#count input[type=number]", "1")
    visitor.type("#steps input[type=number]", "2")
    assert len(visitor.verdicts()) == 1


def test_nothing_is_asked_of_other_machines(visitor: Visitor):
    visitor.prompt(PROMPT)
    visitor.verdicts()
    messages = [json.loads(entry["message"])["message"] for entry in visitor.chrome.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert {urlparse(url).hostname for url in urls if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
