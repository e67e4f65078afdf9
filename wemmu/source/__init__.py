"""A run, a stage or an export, opened to generate images or answers: `wemmu sample` and `wemmu ui` use it.

All kinds sample with `wemmu.sampling.sampler`: a stage through its recipe, an export through its pipeline.
"""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from wemmu.command_line import UsageError
from wemmu.config.checkpoints import trained_stage
from wemmu.config.exported import PARITY
from wemmu.config.schema import Sampling
from wemmu.published.check import latent_px
from wemmu.published.layout import read_json
from wemmu.readable import valid
from wemmu.source.kinds import EXPORT, open_export, open_exported_vlm, open_pipeline, open_stage
from wemmu.source.opened import Source
from wemmu.source.options import SampleOptions
from wemmu.source.settings import png, save_image, settings_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXPORT",
    "SampleOptions",
    "Source",
    "check_request",
    "choose_device",
    "is_tuned_vlm",
    "open_pipeline",
    "open_source",
    "png",
    "save_image",
    "settings_of",
]


def open_source(source: Path, ema: bool | None = None, device: str | None = None) -> Source:
    """Load `source`. ema: whether to use the moving average of the weights; None: if the stage keeps one.

    device: None uses a GPU if there is one.

    Raises:
        ConfigError: if `source` is not a run, a stage or an export, or its config is invalid.
    """
    exported = open_export if (source / EXPORT).is_file() else open_exported_vlm if is_tuned_vlm(source) else None
    if exported is not None:
        if ema is not None:
            raise UsageError(f"{source} is an export, which has one set of weights; --ema is for RUN and RUN/STAGE")
        return exported(source, choose_device(device))
    return open_stage(*trained_stage(source, ema), ema, choose_device(device))


def check_request(source: Path, options: SampleOptions, ema: bool | None = None) -> None:
    """Refuse, before weights are loaded, what the small files of a model exclude.

    Raises:
        UsageError: names the option and what is valid. ConfigError: as `open_source`.
    """
    solvers = get_args(Sampling.model_fields["solver"].annotation)
    if options.solver is not None and options.solver not in solvers:
        raise UsageError(f"--solver {options.solver} is unknown; {valid(options.solver, solvers)}")
    draws, table, vlm, vae = True, 0, source / "vlm", source / "vae"
    if (source / EXPORT).is_file():
        index, bridge = read_json(source / EXPORT), read_json(source / "bridge" / "config.json")["bridge"]
        side, aspect, table = index.get("resolution"), index.get("max_aspect", 2.0), bridge["position_table"]
    elif is_tuned_vlm(source):
        draws = False
    else:
        _, run = trained_stage(source, ema)
        draws, vlm, vae = run.recipe.draws, run.backbones.vlm, run.backbones.vae or vae
        side, aspect = run.stage.resolution, run.data.max_aspect
        table = run.recipe.position_table
    options.check(draws)
    options.check_used(draws)
    # An export without its VLM is refused when it is opened.
    if table and side and options.size and (vlm / "config.json").is_file():
        # With it comes torch.
        from wemmu.sampling.request import request_sizes

        vision = read_json(vlm / "config.json")["vision_config"]
        token = vision["patch_size"] * vision["spatial_merge_size"]
        if problem := request_sizes(side, aspect, table, token, latent_px(vae)).problem(options.size):
            raise UsageError(f"--size: {problem}")


def is_tuned_vlm(directory: Path) -> bool:
    """Return whether it is an exported VLM: a VLM's directory with the report of the export."""
    return (directory / "config.json").is_file() and (directory / PARITY).is_file()


def choose_device(name: str | None) -> "torch.device":
    """Raise UsageError if there is no such device here."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device
