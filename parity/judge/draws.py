"""Dropout on both sides from the same draws: the n-th mask of a run is a function of n, the seed and its shape.

Stands in for `torch.nn.functional.dropout`, `flax.linen.Dropout`, `flax.nnx.Dropout` and `equinox.nn.Dropout` while a
side runs in training. Other randomness is the side's own, and a candidate that draws in another order differs.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from parity.judge.layouts import Layout

SEED = 31


class Draws:
    def __init__(self, layout: Layout | None = None, seed: int = SEED) -> None:
        self.seed, self.n, self.layout = seed, 0, layout or Layout()

    def kept(self, shape: tuple[int, ...], rate: float) -> np.ndarray:
        """Which elements stay, bool; drawn in the reference's layout."""
        self.n += 1
        drawn = np.random.default_rng((self.seed, self.n)).random(self.layout.of_output(tuple(shape), back=True))
        return np.ascontiguousarray(self.layout.input(drawn)) >= rate


@contextlib.contextmanager
def dropout_drawn(mode: str, layout: Layout | None = None) -> Iterator[Draws]:
    """While this is open, what drops out draws from here; in eval mode nothing does. layout: of a candidate."""
    draws = Draws(layout)
    with contextlib.ExitStack() as stack:
        if mode == "train":
            for patch in _patches(draws):
                stack.enter_context(patch)
        yield draws


def _patches(draws: Draws) -> Iterator[Any]:
    if "torch" in sys.modules:
        import torch

        def dropout(input, p=0.5, training=True, inplace=False):
            if not training or p == 0.0:
                return input
            kept = torch.from_numpy(draws.kept(tuple(input.shape), p)).to(input.device)
            return torch.where(kept, input / (1.0 - p), torch.zeros((), dtype=input.dtype))

        yield mock.patch.object(torch.nn.functional, "dropout", dropout)
    if "flax" in sys.modules:
        import flax.linen
        from flax import nnx

        def linen(module, inputs, deterministic=None, rng=None):
            off = module.deterministic if deterministic is None else deterministic
            return _dropped(draws, inputs, module.rate, bool(off), module.broadcast_dims)

        def of_nnx(module, inputs, *, deterministic=None, rngs=None):
            off = module.deterministic if deterministic is None else deterministic
            return _dropped(draws, inputs, module.rate, bool(off), module.broadcast_dims)

        yield mock.patch.object(flax.linen.Dropout, "__call__", linen)
        yield mock.patch.object(nnx.Dropout, "__call__", of_nnx)
    if "equinox" in sys.modules:
        import equinox

        def of_equinox(module, x, *, key=None, inference=None, deterministic=None):
            return _dropped(draws, x, module.p, bool(module.inference if inference is None else inference), ())

        yield mock.patch.object(equinox.nn.Dropout, "__call__", of_equinox)


def _dropped(draws: Draws, x: Any, rate: float, off: bool, broadcast: tuple[int, ...]) -> Any:
    import jax.numpy as jnp

    if off or rate == 0.0:
        return x
    shape = tuple(1 if i in broadcast else n for i, n in enumerate(x.shape))
    return jnp.where(jnp.asarray(draws.kept(shape, rate)), x / (1.0 - rate), jnp.zeros((), x.dtype))
