"""An optax transformation against a torch optimizer, and what the comparison of pairs shares."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch

from llm_common.errors import counted
from parity.core.compare import EPS, Row, Side, tensor_errors, worst
from parity.judge.jax_side import scope
from parity.pair.matching import Arrays

EITHER = Side.UNKNOWN


# What is allowed is this many times what one ulp in every weight and input does within JAX, and at least FLOOR ulps:
# every operation between rounds as well, and for a network of some depth that adds up to a few times the effect of one
# rounding of all its inputs. Measured over the examples and 20 seeds: at most 3 times.
NOISE_FACTOR = 16.0


FLOOR = 64.0


STEPS = (1, 3, 10)


def compare_optimizers(
    optax_optimizer: Any,
    torch_optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    params: Mapping[str, np.ndarray],
    steps: Sequence[int] = STEPS,
    dtypes: Sequence[str] = ("float64", "float32"),
) -> list[Row]:
    """An optax transformation against a torch optimizer: the same parameters, the same gradients, step by step.

    The error is that of the update since the start. Allowed: what one ulp in every gradient and parameter does within
    optax.
    """
    rows = []
    for dtype in dtypes:
        rng = np.random.default_rng(12)
        grads = [{n: rng.standard_normal(p.shape) * 0.1 for n, p in params.items()} for _ in range(max(steps))]
        with scope(dtype):
            ours = _optax_run(optax_optimizer, params, grads, dtype, steps)
            theirs = _torch_run(torch_optimizer, params, grads, dtype, steps)
            nudge = lambda x, rng=rng, dtype=dtype: x * (1 + EPS[dtype] * rng.choice([-1.0, 1.0], np.shape(x)))
            nudged = [{n: nudge(g) for n, g in step.items()} for step in grads]
            control = _optax_run(optax_optimizer, {n: nudge(p) for n, p in params.items()}, nudged, dtype, steps)
        for n in steps:
            name, error = worst(tensor_errors(ours[n], theirs[n]))
            noise = worst(tensor_errors(control[n], ours[n]))[1]
            allowed = allowed_error(dtype, noise)
            # an update is a difference of weights, each rounded to its own spacing
            size = min(
                float(np.linalg.norm(x)) / max(float(np.linalg.norm(params[k])), 1e-300) for k, x in theirs[n].items()
            )
            allowed += 2 * (n + 1) * EPS[dtype] / max(size, 1e-300)
            ok = error <= allowed and any(x.any() for x in theirs[n].values())
            note = "" if any(x.any() for x in theirs[n].values()) else "torch's optimizer changed nothing"
            rows.append(
                Row(
                    "optimizer",
                    f"update after {counted(n, 'step')}",
                    dtype,
                    error,
                    allowed,
                    ok,
                    "" if ok else EITHER,
                    note or name,
                    name,
                    noise,
                )
            )
    return rows


def _optax_run(optimizer, params, grads, dtype, steps) -> dict[int, Arrays]:
    start = {n: jnp.array(p, jnp.dtype(dtype)) for n, p in params.items()}
    values, state, kept = start, optimizer.init(start), {}
    for n, g in enumerate(grads, start=1):
        updates, state = optimizer.update({k: jnp.array(x, jnp.dtype(dtype)) for k, x in g.items()}, state, values)
        values = optax.apply_updates(values, updates)
        if n in steps:
            kept[n] = {k: to_numpy(values[k]) - to_numpy(start[k]) for k in start}  # type: ignore[index]
    return kept


def _torch_run(make, params, grads, dtype, steps) -> dict[int, Arrays]:
    values = {n: torch.nn.Parameter(torch.tensor(p, dtype=getattr(torch, dtype))) for n, p in params.items()}
    start = {n: to_numpy(p) for n, p in values.items()}
    optimizer, kept = make(list(values.values())), {}
    for n, g in enumerate(grads, start=1):
        for k, p in values.items():
            p.grad = torch.tensor(g[k], dtype=p.dtype)
        optimizer.step()
        if n in steps:
            kept[n] = {k: to_numpy(p) - start[k] for k, p in values.items()}
    return kept


def allowed_error(dtype: str, noise: float) -> float:
    return max(FLOOR * EPS[dtype], NOISE_FACTOR * noise)


def to_numpy(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return np.array((x.double() if x.is_floating_point() else x).numpy())  # a copy: torch works in place
    return np.array(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.array(x)
