"""What the server has loaded from which `benchmarks.step` forks its processes."""

from wemmu.command_line import without_unused

# bitsandbytes asks for the GPU as soon as it is imported, and CUDA refuses to begin anew in a process forked after it.
with without_unused():
    import benchmarks.step  # noqa: F401
