"""XLA compiles the small programs of tests in a third of the time without one of its passes."""

import os


def pytest_configure(config) -> None:
    """Before the processes that share the tests begin: they inherit the environment."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        from parity.core.compile_time import add_flags, known_flags

        if not os.environ.get("XLA_FLAGS"):
            add_flags(known_flags())
