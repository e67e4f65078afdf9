"""What a conversion frees goes back to the system."""

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_BYTES = 128 * 1024


def return_what_is_freed() -> None:
    """Keep glibc's threshold, from which on memory is mapped and given back, where it is at first. For this process.

    It rises with each larger tensor that is freed. From then on tensors of that size lie in the heap, aligned: a freed
    one may be a few bytes too small for the next of its size, and by chance everything converted piles up.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BYTES)
