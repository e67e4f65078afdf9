"""The task families: what a sample gives the model and what it must make of it."""

from enum import StrEnum


class Task(StrEnum):
    """Values name shard streams, metrics and mixture weights.

    T2I: prompt -> picture. RECONSTRUCTION: picture without words -> the same picture. UNCONDITIONAL: nothing -> a
    picture. EDIT: one picture and an instruction -> picture. MULTI_EDIT: several pictures and an instruction ->
    picture. UNDERSTANDING: picture and question -> words; what a VLM is tuned on.
    """

    T2I = "t2i"
    RECONSTRUCTION = "reconstruction"
    UNCONDITIONAL = "unconditional"
    EDIT = "edit"
    MULTI_EDIT = "multi_edit"
    UNDERSTANDING = "understanding"


# Tasks that can do with the pictures of text-to-image records, and do where a data set has no records of their own.
FROM_T2I = (Task.RECONSTRUCTION, Task.UNCONDITIONAL)
GENERATION_TASKS = (Task.T2I, Task.RECONSTRUCTION, Task.UNCONDITIONAL, Task.EDIT, Task.MULTI_EDIT)
UNDERSTANDING_TASKS = (Task.UNDERSTANDING,)
# What reports call them.
TASK_NAMES = {
    Task.T2I: "Text to image",
    Task.RECONSTRUCTION: "Reconstruction",
    Task.UNCONDITIONAL: "Unconditional",
    Task.EDIT: "Edit",
    Task.MULTI_EDIT: "Multi-image edit",
    Task.UNDERSTANDING: "Understanding",
}
