"""Processes that other processes begin: none outlives the one that began it."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Let this worker end when the process that began it is gone: one that was killed could not tell it to.

    To be called first in a worker of `multiprocessing`.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "for a worker"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
