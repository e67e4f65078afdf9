"""The tasks: what a sample gives the model and what the model returns."""

from enum import StrEnum


class Task(StrEnum):
    """Values name shard streams, metrics and mixture weights.

    T2I: prompt -> image. RECONSTRUCTION: image without text -> the same image. UNCONDITIONAL: nothing -> image. EDIT:
    one image and an instruction -> image. MULTI_EDIT: several images and an instruction -> image. UNDERSTANDING: image
    and question -> text; tunes a VLM. CAPTION: image -> text that describes it; the recipe asks for it.
    """

    T2I = "t2i"
    RECONSTRUCTION = "reconstruction"
    UNCONDITIONAL = "unconditional"
    EDIT = "edit"
    MULTI_EDIT = "multi_edit"
    UNDERSTANDING = "understanding"
    CAPTION = "caption"


# Tasks that use the images of text-to-image records if a data set has no records of their own.
FROM_T2I = (Task.RECONSTRUCTION, Task.UNCONDITIONAL, Task.CAPTION)
GENERATION_TASKS = (Task.T2I, Task.RECONSTRUCTION, Task.UNCONDITIONAL, Task.EDIT, Task.MULTI_EDIT)
EDITS = (Task.EDIT, Task.MULTI_EDIT)
UNDERSTANDING_TASKS = (Task.UNDERSTANDING,)
# Names in reports.
TASK_NAMES: dict[str, str] = {
    Task.T2I: "Text to image",
    Task.RECONSTRUCTION: "Reconstruction",
    Task.UNCONDITIONAL: "Unconditional",
    Task.EDIT: "Edit",
    Task.MULTI_EDIT: "Multi-image edit",
    Task.UNDERSTANDING: "Understanding",
    Task.CAPTION: "Caption",
}
