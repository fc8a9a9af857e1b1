"""How the process holds its memory on CPUs."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of handing it back to the kernel, which maps every page anew when it is asked
    for again: on CPUs, steps of the same size would pay for that over and over. Does nothing where there is no mallopt."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
