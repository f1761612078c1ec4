"""Each framework's own noise: how far it moves from itself by a choice that changes no mathematics.

Compiled or not, sequences together or one by one, the same run again, fused attention or the reference. A difference
between the frameworks that is no larger is noise; a larger one is a difference, allowed or not.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_common.errors import UserError
from parity.checks.model import CEILING, specified
from parity.core.compare import Row, Tensors, one_ulp_noise, tensor_errors, worst
from parity.core.inputs import families, random_batch, random_weights
from parity.sides.settings import Settings

# A control moves each side by rounding alone, as far as the two sides may be from the specification together.
FLOAT64_ALLOWED = 2e-12
# In low precision it is at most what one ulp everywhere does, once for either of the two results.
CEILINGS = 2.0


def check_noise(s: Settings) -> Iterator[Row]:
    """The logits and gradients of each side under each control, against its own."""
    for dtype in s.dtypes:
        weights = random_weights(s.cfg, s.seed, dtype)
        ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
        allowed = FLOAT64_ALLOWED if dtype == "float64" else CEILINGS * ceiling(s, dtype, weights, ids, targets)
        for side in s.sides(dtype):
            base = {
                "logits": {"logits": side.logits(weights, ids)},
                "gradients": side.loss_and_grads(weights, ids, targets)[1],
            }
            if dtype != "bfloat16":
                yield from _fused_window(s, side, dtype, weights, ids, allowed)
            for what, control, found in _controls(s, side, dtype, weights, ids, targets):
                error = worst(tensor_errors(found, base[what]))[1]
                ok = error <= allowed
                item = f"{side.name}, {what}: {control}"
                yield Row("noise", item, dtype, error, allowed, ok, "" if ok else side.name)


def _fused_window(
    s: Settings, side: Any, dtype: str, weights: Tensors, ids: np.ndarray, allowed: float
) -> Iterator[Row]:
    """Fused attention has a code of its own for a window."""
    cfg = families(s.cfg)["Mistral: window of 4"]
    with contextlib.suppress(UserError):
        found = [
            {"logits": type(side)(cfg, dtype, s.device, attention).logits(weights, ids)}
            for attention in ("fused", "reference")
        ]
        error = worst(tensor_errors(*found))[1]
        ok = error <= allowed
        item = f"{side.name}, logits: fused attention with a window against the reference"
        yield Row("noise", item, dtype, error, allowed, ok, "" if ok else side.name)


def _controls(
    s: Settings, side: Any, dtype: str, weights: Tensors, ids: np.ndarray, targets: np.ndarray
) -> Iterator[tuple[str, str, Tensors]]:
    alone = np.concatenate([side.logits(weights, row[None]) for row in ids])
    yield "logits", "the same run again", {"logits": side.logits(weights, ids)}
    yield "logits", f"one sequence at a time against {len(ids)}", {"logits": alone}
    yield (
        "gradients",
        "sequences in reverse order",
        side.loss_and_grads(weights, ids[::-1].copy(), targets[::-1].copy())[1],
    )
    if side.name == "JAX":
        if dtype != "float64":
            yield "logits", "uncompiled against jit", {"logits": side.uncompiled_logits(weights, ids)}
        # operation by operation they would take ten seconds to compile
        yield "gradients", "compiled without optimisation", side.unoptimised_gradients(weights, ids, targets)
    elif s.compile:
        yield "logits", "torch.compile against eager", {"logits": side.compiled_logits(weights, ids)}
    if dtype == "float64":  # the other ways to run the same layers
        variants: dict[str, dict[str, Any]] = {"remat full against none": {"remat": "full"}}
        if side.name == "JAX":
            variants["layers scanned against one by one"] = {"scan_layers": True}
        for control, fields in variants.items():
            yield "gradients", control, side.variant(**fields).loss_and_grads(weights, ids, targets)[1]
    if dtype == "bfloat16" and s.device == "cpu" and side.name == "JAX":
        return  # XLA's attention is made of the same operations as the reference there
    with contextlib.suppress(UserError):  # there is no fused attention for float64 in JAX
        fused = type(side)(side.cfg, dtype, s.device, "fused" if side.attention == "reference" else "reference")
        yield "logits", "fused attention against the reference", {"logits": fused.logits(weights, ids)}
        yield "gradients", "fused attention against the reference", fused.loss_and_grads(weights, ids, targets)[1]


# which control stands beside the figures of a check
BESIDE = {"logits": "logits", "cache": "logits", "evaluation": "logits", "loss": "gradients", "gradients": "gradients"}


def with_noise(rows: list[Row]) -> list[Row]:
    """The rows, with the noise of their dtype beside the errors: the largest of either framework's controls."""
    largest: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.check == "noise" and row.dtype:
            key = (row.dtype, row.item.split(":")[0].split(", ")[1])
            largest[key] = max(largest.get(key, 0.0), row.measured)
    return [
        dataclasses.replace(row, noise=largest.get((row.dtype, BESIDE[row.check])))
        if row.check in BESIDE and row.noise is None and "ratio" not in row.item
        else row
        for row in rows
    ]


def ceiling(s: Settings, dtype: str, weights: Tensors, ids: np.ndarray, targets: np.ndarray) -> float:
    """The error that one ulp in every weight and intermediate result makes in the worst gradient or in the logits."""
    moved = specified(s, weights, ids, targets, one_ulp_noise(s.seed, dtype))
    exact = specified(s, weights, ids, targets)
    return CEILING[dtype] * max(worst(tensor_errors(moved[what], exact[what]))[1] for what in exact)
