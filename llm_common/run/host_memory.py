"""The memory of the machine: how much there is, how much was used, and what becomes of what is freed."""

import contextlib
import ctypes
import os
import resource
import sys


def host_memory() -> int | None:
    """Bytes of memory that this machine can still give, or None if it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            return None


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of giving it back to the system.

    Else the large arrays of every step are new pages, which the system clears one by one: a fifth of a small model's
    step in JAX. The price is memory, up to 1.8 times the peak of before in JAX, as what is saved or evaluated in
    between splits what was kept; and of a large step it saves little. So it is for steps of less than half a GiB on a
    CPU. glibc alone knows these settings. All threads share one heap then, as those of others cannot grow beyond 64
    MiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def host_memory_used() -> int:
    """The most bytes that this process has held."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
