"""Processes that other processes begin: none outlives the one that began it."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator

# the descriptor and inode of a pipe that closes when the process that began this one is gone
PARENT = "ONE_MODEL_TWICE_PARENT"


def end_with_parent() -> None:
    """Let this worker end when the process that began it is gone: one that was killed could not tell it to.

    To be called first in a worker of `multiprocessing`.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "for a worker"
    _end_after(lambda: multiprocessing.connection.wait([parent.sentinel]))


@contextlib.contextmanager
def lifeline() -> Iterator[tuple[int, dict[str, str]]]:
    """What a process of `subprocess` needs to notice that this one is gone: a descriptor for `pass_fds`, and variables
    for `env`.

    It must call `end_with_launcher`.
    """
    reading, writing = os.pipe()
    try:
        yield reading, {PARENT: f"{reading}:{os.fstat(reading).st_ino}"}
    finally:
        os.close(reading)
        os.close(writing)


def end_with_launcher() -> None:
    """Let this process end when the one that began it with a `lifeline` is gone. Without one nothing happens."""
    descriptor, _, inode = os.environ.pop(PARENT, "").partition(":")
    with contextlib.suppress(OSError):  # the variable came through a process that did not pass the descriptor on
        if descriptor and os.fstat(int(descriptor)).st_ino == int(inode):
            _end_after(lambda: os.read(int(descriptor), 1))  # returns when the other end is closed


def _end_after(wait: Callable[[], object]) -> None:
    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
