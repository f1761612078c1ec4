"""XLA compiles the small programs of tests in a third of the time without one of its passes, and each of them once."""

import os
import shutil
import tempfile

import pytest

CACHE = pytest.StashKey[str]()


def pytest_configure(config) -> None:
    """Before the processes that share the tests begin: they, and the programs that they call, inherit the
    environment.
    """
    os.environ.setdefault("ONE_MODEL_HEARTBEAT", "600")  # tests compare what is said with what should be
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        from parity.core.compile_time import add_flags, known_flags

        if not os.environ.get("XLA_FLAGS"):
            add_flags(known_flags())
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            config.stash[CACHE] = tempfile.mkdtemp(prefix="one-model-twice-")
            os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[CACHE]
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def pytest_unconfigure(config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)
