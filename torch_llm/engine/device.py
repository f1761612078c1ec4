"""Devices by name, and what is set while one of them computes.

here                                   jax_llm.engine.device
nothing: torch has every dtype         x64, a context: JAX has float64
                                       only where it is switched on
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from llm_common.config import ExecutionConfig
from llm_common.errors import UserError
from llm_common.run.host_memory import host_memory, host_memory_used


@contextlib.contextmanager
def matmul_precision(compute_dtype: str) -> Iterator[None]:
    """float32 means float32: TF32, which rounds the factors to 10 bits, is switched off for it while this is open."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if compute_dtype == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic_algorithms(execution: ExecutionConfig) -> Iterator[None]:
    """While this is open torch takes, if the run asks for it, only algorithms that give the same bits every time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or execution.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def select_device(name: str) -> torch.device:
    """The device called "cpu", "gpu", "cuda", "cuda:1" or "mps"; "auto": a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = "cuda" if name == "gpu" else name
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device that computes")
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        found = "cpu, gpu" if torch.cuda.is_available() else "cpu"
        raise UserError(
            f"torch cannot use device {name!r} here ({str(error).splitlines()[0]}); present: {found}"
        ) from None
    return device


def device_kind(device: str) -> str:
    """What a device (by name) calls itself."""
    target = select_device(device)
    return torch.cuda.get_device_name(target) if target.type == "cuda" else target.type


def memory_limit(device: str) -> int | None:
    """How many bytes a device (by name) can give now, or None if it does not say."""
    target = select_device(device)
    return torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else host_memory()


def memory_used(device: str) -> int:
    """The most bytes that were in use on a device (by name)."""
    target = select_device(device)
    return torch.cuda.max_memory_allocated(target) if target.type == "cuda" else host_memory_used()


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """A batch's ids, int64, on a device, of whose work nothing is waited for."""
    ids = torch.tensor(np.ascontiguousarray(x))
    return (ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)).long()


def to_host_later(x: Tensor) -> Callable[[], Tensor]:
    """A function that gives x on the host and waits until it is there, but for nothing that the device begins
    afterwards.
    """
    if not x.is_cuda:
        return lambda: x
    copy, there = x.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait
