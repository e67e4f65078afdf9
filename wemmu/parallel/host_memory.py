"""Gives freed host memory back to the system."""

import ctypes
import platform


def trim() -> None:
    """Return the free pages of glibc's heap to the system.

    Tensors of up to 32 MB lie in the heap, and small ones that stay, shards, lie between those that were freed: without
    this a rank that shards a model block by block ends with the size of the model, not of its shards.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
