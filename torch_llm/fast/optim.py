"""Norm, clip and update in fewer passes over memory."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_llm import optim
from torch_llm.optim import AdamW, adamw_update, gradient, wide_dtype


def sums_of_squares(grads: list[Tensor]) -> Tensor:
    """`optim.sums_of_squares`; on a GPU by a kernel for many tensors at once."""
    return sums_at_once(grads) if grads[0].is_cuda else optim.sums_of_squares(grads)


def sums_at_once(grads: list[Tensor]) -> Tensor:
    """The same by a kernel for many tensors at once."""
    norms = torch._foreach_norm(grads, 2, dtype=wide_dtype(grads))  # pyright: ignore[reportPrivateImportUsage]
    return torch.square(torch.stack(norms))


def clipped_update(
    p: Tensor,
    mu: Tensor,
    nu: Tensor,
    g: Tensor,
    factor: Tensor,
    finite: Tensor,
    scalars: list[Tensor],
    *settings: float,
) -> None:
    """Clip and update in one pass over memory. If `finite`, a bool tensor on the device, is False, nothing changes."""
    new = [x.clone() for x in (p, mu, nu)]
    g = g.to(p.dtype) * factor
    adamw_update(*new, g, scalars, *settings)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for old, x in zip((p, mu, nu), new, strict=True):
        old.copy_(torch.where(finite, x, old))


@functools.cache
def compiled_update() -> Callable[..., None]:
    """`clipped_update` compiled: one program for tensors of any size, with the scalars as inputs.

    All tensors in one program would take minutes to compile.
    """
    return torch.compile(clipped_update, dynamic=True)


class CompiledAdamW(AdamW):
    """AdamW whose update is a compiled program that asks the device whether there is one, and the host nothing."""

    def update_group(
        self,
        group: dict[str, Any],
        scalars: tuple[float, float, float],
        settings: tuple[float, float, float, float],
        factor: Tensor | float = 1.0,
        finite: Tensor | None = None,
    ) -> None:
        """An update with the gradients times `factor`.

        finite: bool tensor on the device. If False, the update changes nothing; `count` has been raised already, so the
        caller must lower it.
        """
        update, device = compiled_update(), group["params"][0].device
        dtype = wide_dtype(group["params"])  # a wider one would make the whole update as wide
        on_host = torch.tensor(scalars, dtype=dtype, pin_memory=device.type == "cuda")
        on_device = list(on_host.to(device, non_blocking=True).unbind())
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=dtype, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device) if finite is None else finite
        for p in group["params"]:
            tensors = self.master(p), *self.moments(p), gradient(p)
            flat = [x.detach().reshape(-1) for x in tensors]  # views: one shape for the program to know
            update(*flat, factor, finite, on_device, *settings)
            self.round_master(p)
