"""Less time in XLA's compiler: two thirds of the ladder's time on a CPU were spent there. The mathematics is
the same.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator

import jax

# XLA's newer way to write the loops of a fusion takes three times as long to compile; small programs run as fast
# without.
OPTION = "xla_cpu_use_fusion_emitters"


@contextlib.contextmanager
def quick_to_compile() -> Iterator[None]:
    """While this is open XLA leaves out what takes it longest; the optimised programs are judged by other checks."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def add_flags(flags: str) -> None:
    """Flags of XLA for this process, before it first computes. A flag that XLA does not know would end the process."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def known_flags() -> str:
    """The flag of `OPTION` if this version of XLA has it, else nothing; asked of a compiler on the CPU."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda x: x, compiler_options={OPTION: False})(0)
    except Exception:  # each version says it in an error of its own
        return ""
    return f"--{OPTION}=false"


def share_compiled(cache: str) -> None:
    """Read from a folder, and write to it, every program that JAX compiles in this process."""
    # what another process is still writing is compiled once more
    warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
