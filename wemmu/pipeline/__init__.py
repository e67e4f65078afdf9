"""WeMMU as a diffusers pipeline, loaded from an export.

    pipe = WeMMUPipeline.from_pretrained(directory)
    pipe("a red circle at the top left and a blue square at the bottom right").images[0]
    pipe("make the circle green", image=image).images[0]

`arguments` reads a call; the model computes the condition and the sampler solves.
"""

from wemmu.pipeline.arguments import beyond, check_size
from wemmu.pipeline.pipeline import PIPELINE_FILE, WeMMUPipeline, scheduler_solver, write_entry

__all__ = [
    "PIPELINE_FILE",
    "WeMMUPipeline",
    "beyond",
    "check_size",
    "scheduler_solver",
    "write_entry",
]
