"""Memory that a training step frees is kept for the next one."""

import ctypes
import platform

NEVER_MAP, NEVER_TRIM = (-4, 0), (-1, 2**31 - 1)  # glibc's M_MMAP_MAX and M_TRIM_THRESHOLD, and their values


def keep_memory() -> None:
    """From now on this process gives no memory back before it ends, if its C library is glibc.

    PyTorch has no cache of its own on a CPU. By default glibc returns every large array when it is freed, and the
    system clears each page of the next one: activations, logits and gradients of every micro batch.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)  # of the process: one that was preloaded takes the options, or ignores them
        for option in (NEVER_MAP, NEVER_TRIM):
            allocator.mallopt(*option)
