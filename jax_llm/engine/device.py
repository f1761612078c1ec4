"""Devices by name, and what is set while one of them computes.

here                                   torch_llm.engine.device
x64, a context: JAX has float64        nothing: torch has every dtype
only where it is switched on
"""

import contextlib
import os
from typing import Any

import jax

from llm_common.errors import UserError, first_line
from llm_common.run.host_memory import host_memory, host_memory_used


def matmul_precision(compute_dtype: str):
    """float32 means float32: an accelerator's default would be TF32 or bfloat16. To be entered while tracing."""
    return jax.default_matmul_precision("highest") if compute_dtype == "float32" else contextlib.nullcontext()


def x64(master_dtype: str):
    """A context in which arrays of the master dtype can exist, and none that is wider: JAX has float64 only where it is
    switched on, and where it is, numbers that a float32 run makes of Python's would be float64.
    """
    return jax.enable_x64(master_dtype == "float64")


def platform_devices(name: str) -> list[Any]:
    """All devices of a platform ("cpu", "gpu" or "tpu"), of every host, or those of the default one for "auto"."""
    try:
        return jax.devices(None if name == "auto" else name)
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS")
        if asked:
            why = first_line(error)
            raise UserError(f"JAX_PLATFORMS={asked}: JAX cannot start so ({why}); unset it") from None
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise UserError(
            f"JAX sees no {name} here, only: {found}; use one of these or install jax[cuda13] / jax[tpu]"
        ) from None


def select_device(name: str) -> Any:
    """This host's first device of a platform (by name)."""
    return next(d for d in platform_devices(name) if d.process_index == jax.process_index())


def device_kind(device: str) -> str:
    """What a device (by name) calls itself."""
    return select_device(device).device_kind


def memory_limit(device: str) -> int | None:
    """How many bytes an array may take on a device (by name) now, or None if it does not say."""
    stats = select_device(device).memory_stats() or {}
    return stats.get("bytes_limit") if stats else host_memory()


def memory_used(device: str) -> int:
    """The most bytes that were in use on a device (by name)."""
    return (select_device(device).memory_stats() or {}).get("peak_bytes_in_use") or host_memory_used()
