"""The page: its fields, and what happens when they are used."""

import math
from collections.abc import Iterator
from pathlib import Path
from random import randrange
from typing import Any

import gradio as gr

from wemmu.command_line import UsageError
from wemmu.sample import parse_size
from wemmu.sampling.solvers import SOLVERS
from wemmu.shapes.render import render
from wemmu.shapes.vocabulary import WORLD
from wemmu.source import SampleOptions, Source
from wemmu.ui import cards, scene
from wemmu.ui.examples import examples
from wemmu.ui.models import Models
from wemmu.ui.work import State, read_image, run, sentence

STYLE = Path(__file__).with_name("style.css")
# Larger uploads are refused before they are read, bytes.
MAX_UPLOAD = 50 * 2**20
MAX_COUNT = 16
# A click inside an HTML block is an event with the data-* of the button.
CLICKS = """
element.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (button) trigger('select', {...button.dataset});
});
"""
HELP = "One image is edited as the prompt says, or reconstructed without a prompt; up to four are combined."
# What the button will do, as the fields are now; (prompt, images) -> its label.
LABEL = """
(prompt, images) => {
    const count = (images || []).length;
    if (count == 0) return 'Generate';
    if (count == 1) return prompt.trim() ? 'Edit' : 'Reconstruct';
    return 'Combine';
}
"""


def serve(models: Models, host: str, port: int | None, browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises OSError if no port is free."""
    page = build(models)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        max_file_size=MAX_UPLOAD,
        theme=gr.themes.Default(primary_hue="emerald", radius_size="sm"),
        css_paths=STYLE,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{address}  (Ctrl-C ends the page)", flush=True)
    page.block_thread()


def build(models: Models) -> gr.Blocks:
    """Return the page of `models`; the newest one is open."""
    source = models.open(models.newest)
    with gr.Blocks(title=f"WeMMU: {source.name}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_heading(models, source), elem_id="heading")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                prompt, images = _inputs(source)
                with gr.Row():
                    name = "Generate" if source.draws else "Answer"
                    start = gr.Button(name, variant="primary", elem_id="generate", interactive=False)
                    stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=90)
                miniature = source.world == WORLD and source.draws
                if miniature:
                    _examples(source, prompt, images)
                settings = _settings(models, source)
                if miniature:
                    _builder(source, prompt, images)
            with gr.Column(scale=6, min_width=340):
                shown = gr.HTML(cards.EMPTY, elem_id="results", js_on_load=CLICKS)
                results = gr.State(())
        # Whoever is faster than the page would lose a click.
        page.load(lambda: gr.Button(interactive=True), None, start, queue=False, show_progress="hidden")
        if source.draws:
            edited = [prompt.change, images.change, images.upload, images.delete]
            gr.on(edited, None, [prompt, images], start, js=LABEL, queue=False)
        seeds = {"seed": settings["seed"], "again": settings["again"]}
        drawn = gr.on(
            [start.click, prompt.submit],
            _next_seed,
            list(seeds.values()),
            seeds["seed"],
            queue=False,
            show_progress="hidden",
        ).then(
            _work(models),
            [prompt, images, *settings.values()],
            [shown, results],
            # One at a time: the others wait in the queue, which shows their place.
            concurrency_limit=1,
            show_progress="minimal",
            trigger_mode="once",
        )
        stopped = (cards.html(State(notes=("the request was stopped",))), ())
        stop.click(lambda: stopped, None, [shown, results], cancels=[drawn], queue=False)
        shown.select(_use, [results, images], images, queue=False)
    return page.queue(default_concurrency_limit=4)


def _heading(models: Models, source: Source) -> str:
    said = f"{models.newest}, step {source.origin['step']}, " if "step" in source.origin else ""
    return f"<h1>WeMMU</h1><p>{source.name}: {said}{source.resolution} px. It {source.does}.</p>"


def _inputs(source: Source) -> tuple[gr.Textbox, gr.Gallery]:
    prompt = gr.Textbox(
        "",
        label="Prompt" if source.draws else "Question",
        placeholder="What to generate, or what to do with the images" if source.draws else source.question,
        lines=2,
        max_lines=6,
        submit_btn=False,
        autofocus=True,
        elem_id="prompt",
    )
    images = gr.Gallery(
        label="Input images" if source.draws else "Image",
        type="filepath",
        file_types=["image"],
        format="png",
        columns=4,
        fit_columns=False,
        height=180,
        object_fit="contain",
        interactive=True,
        elem_id="images",
        elem_classes=["pixelated"] if source.world == WORLD else [],
    )
    if source.draws:
        gr.HTML(f"<p class=caption>{HELP}</p>")
    return prompt, images


def _settings(models: Models, source: Source) -> dict[str, gr.components.Component]:
    """The fields of `_options`, by name."""
    default = source.sampling
    names = list(models.folders)
    stages = gr.CheckboxGroup(
        names,
        value=[models.newest],
        label="Stages: choose several to compare what each has learned",
        visible=len(names) > 1,
        elem_id="stages",
    )
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        count = gr.Slider(
            1, MAX_COUNT, 4 if source.draws else 1, step=1, label="Images", elem_id="count", visible=source.draws
        )
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=100)
            again = gr.Checkbox(False, label="Another seed each time", elem_id="again", min_width=100)
        with gr.Row(visible=source.draws):
            steps = gr.Slider(1, 100, default.steps, step=1, label="Steps", elem_id="steps")
            solver = gr.Radio(list(SOLVERS), value=default.solver, label="Solver", elem_id="solver")
        # Text, since an empty number would be 0; empty stands for the model's own.
        with gr.Row(visible=source.draws):
            guidance = gr.Textbox("", label="Guidance: text", elem_id="guidance", placeholder=_guidance(default))
            image_guidance = gr.Textbox(
                "", label="Guidance: image", elem_id="image-guidance", placeholder=f"{default.image:g}"
            )
            size = gr.Textbox("", label="Size, px", placeholder="as the input, or 64x96", elem_id="size")
    return {
        "stages": stages,
        "count": count,
        "seed": seed,
        "again": again,
        "steps": steps,
        "solver": solver,
        "guidance": guidance,
        "image_guidance": image_guidance,
        "size": size,
    }


def _guidance(default: Any) -> str:
    return f"{default.t2i:g}; edits {default.instruction:g}, {default.multi:g}"


def _examples(source: Source, prompt: gr.Textbox, images: gr.Gallery) -> None:
    with gr.Row(elem_id="examples"):
        for example in examples(source.resolution):
            button = gr.Button(example.name, size="sm", min_width=60)
            button.click(lambda one=example: (one.text, list(one.images)), None, [prompt, images], queue=False)


def _builder(source: Source, prompt: gr.Textbox, images: gr.Gallery) -> None:
    with gr.Accordion("Build a scene by clicking", open=False, elem_id="scene"):
        board = gr.State(scene.Board())
        shown = gr.HTML(scene.html(scene.Board()), js_on_load=CLICKS, elem_id="board")
        with gr.Row():
            as_prompt = gr.Button("Use as prompt", size="sm", elem_id="as-prompt")
            as_image = gr.Button("Use as input image", size="sm", elem_id="as-image")
    shown.select(_click, board, [board, shown], queue=False, show_progress="hidden")
    as_prompt.click(lambda one: (one.caption, None), board, [prompt, images], queue=False)
    as_image.click(
        lambda one, given: [*(given or []), (render(one.scene, source.resolution), None)],
        [board, images],
        images,
        queue=False,
    )


def _click(board: scene.Board, event: gr.EventData) -> tuple[scene.Board, str]:
    data = event._data
    board = board.click(int(data["cell"])) if "cell" in data else board.choose(data["choose"], data["value"])
    return board, scene.html(board)


def _use(results: Any, given: Any, event: gr.EventData) -> Any:
    """The image of a card as the only input image."""
    if (number := event._data.get("use")) is None:
        return given
    return [(results[int(number)].image, None)]


def _next_seed(seed: float | None, again: bool) -> int:
    return randrange(2**31) if again else int(seed or 0)


def _work(models: Models) -> Any:
    def work(prompt: str, images: Any, *fields: Any) -> Iterator[tuple[str, Any]]:
        names = ("stages", "count", "seed", "again", "steps", "solver", "guidance", "image_guidance", "size")
        form = dict(zip(names, fields, strict=True))
        try:
            options = _options(prompt, images, form)
        except Exception as error:
            yield cards.html(State(error=sentence(error))), ()
            return
        for state in run(models, form["stages"], options):
            yield cards.html(state), state.results

    return work


def _options(prompt: str, images: Any, form: dict[str, Any]) -> SampleOptions:
    """Raise UsageError for a file that is not an image, or an invalid size."""
    return SampleOptions(
        prompt=prompt.strip(),
        images=tuple(read_image(Path(file)) for file, _ in images or ()),
        size=parse_size(form["size"].strip().replace(" ", "") or None),
        seed=int(form["seed"] or 0),
        count=int(form["count"]),
        steps=int(form["steps"]),
        guidance=_weight("Guidance: text", form["guidance"]),
        image_guidance=_weight("Guidance: image", form["image_guidance"]),
        solver=form["solver"],
    )


def _weight(label: str, text: str) -> float | None:
    try:
        value = float(text) if text.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{label} is {text!r}; valid: a number such as 1.5, or nothing for the model's own")
    return value
