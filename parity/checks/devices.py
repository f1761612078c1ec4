"""What only an accelerator has: each framework against itself on the CPU, and float32 with its matrix products in TF32;
and on a CPU what a TPU's matrix products would do to float32.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_llm.engine.checkpoint import from_canonical, to_canonical
from jax_llm.engine.gradients import loss_and_grads
from jax_llm.model import CausalLM
from parity.checks.model import CEILING, FLOAT64_ALLOWED, specified
from parity.core.compare import JAX, TORCH, Row, Tensors, one_ulp_noise, tensor_errors, verdict, worst
from parity.core.emulation import with_bfloat16_operands
from parity.core.inputs import random_batch, random_weights
from parity.sides.settings import Settings

# TF32 keeps 10 bits of each factor: what moving everything by one ulp of such a number does is the ceiling. Where it is
# really used the error is far above float32's.
TF32_AT_LEAST = 10.0


def check_device(s: Settings) -> Iterator[Row]:
    """On a CPU a TPU's float32. Elsewhere logits and gradients of either framework there against its own on the CPU;
    then TF32.
    """
    if s.device == "cpu":
        if "float32" in s.dtypes:
            yield from _tpu_operands(s)
        return
    for dtype in s.dtypes:
        weights = random_weights(s.cfg, s.seed, dtype)
        ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
        exact = specified(s, weights, ids, targets)
        allowed = dict.fromkeys(exact, 2 * FLOAT64_ALLOWED)
        if dtype != "float64":
            moved = specified(s, weights, ids, targets, one_ulp_noise(s.seed, dtype))
            allowed = {what: 2 * CEILING[dtype] * worst(tensor_errors(moved[what], exact[what]))[1] for what in exact}
        for here, there in zip(s.sides(dtype), s.on("cpu", "reference").sides(dtype), strict=True):
            for what in exact:
                name, error = worst(
                    tensor_errors(_run(here, what, weights, ids, targets), _run(there, what, weights, ids, targets))
                )
                ok = error <= allowed[what]
                item = f"{here.name}, {what}: {s.device} against cpu"
                yield Row("device", item, dtype, error, allowed[what], ok, "" if ok else here.name, name, name)
    if "float32" in s.dtypes and s.device == "gpu":
        yield from _tf32(s)


def _tf32(s: Settings) -> Iterator[Row]:
    """float32 with TF32 allowed, against float64: below its own ceiling, and far above float32's error, or it is not in
    use.
    """
    weights = random_weights(s.cfg, s.seed, "float32")
    ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
    exact = specified(s, weights, ids, targets)
    moved = specified(s, weights, ids, targets, one_ulp_noise(s.seed, "tf32"))
    for what in exact:
        found = []
        for side in s.sides("float32"):
            plain = worst(tensor_errors(_run(side, what, weights, ids, targets), exact[what]))[1]
            side.tf32 = True
            found.append((worst(tensor_errors(_run(side, what, weights, ids, targets), exact[what]))[1], plain))
        allowed = worst(tensor_errors(moved[what], exact[what]))[1]
        bad = [not error <= allowed for error, _ in found]
        side = verdict(*bad, alike=True)
        used = [
            f"{name} {error / plain:.0f} times float32"
            for name, (error, plain) in zip((JAX, TORCH), found, strict=True)
        ]
        unused = [n for n, (e, p) in zip((JAX, TORCH), found, strict=True) if e < TF32_AT_LEAST * p]
        note = ", ".join(used) + (f"; not in use in {' and '.join(unused)} for these shapes" if unused else "")
        yield Row(
            "device",
            f"{what} in TF32 against float64",
            "float32",
            max(e for e, _ in found),
            allowed,
            not side,
            side,
            note,
        )


def _tpu_operands(s: Settings) -> Iterator[Row]:
    """float32 as a TPU computes it by default, emulated, against float64: what somebody who trains there should expect.

    The ceiling is what moving everything by one ulp of bfloat16 does; the factors of products are a part of that. The
    error must also be far above float32's own, or the emulation emulates nothing.
    """
    weights = random_weights(s.cfg, s.seed, "float32")
    ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
    exact = specified(s, weights, ids, targets)
    moved = specified(s, weights, ids, targets, one_ulp_noise(s.seed, "bfloat16"))
    params = from_canonical(s.cfg, weights, jnp.float32)
    model = CausalLM(s.cfg)
    functions = {
        "logits": lambda params, ids, targets: model.apply({"params": params}, ids)[0],
        "gradients": lambda params, ids, targets: loss_and_grads(model, params, ids, targets)[1],
    }
    for what, function in functions.items():
        errors = []
        for run in (with_bfloat16_operands(function), function):
            out = jax.jit(run)(params, jnp.array(ids), jnp.array(targets))
            got = {"logits": np.array(out)} if what == "logits" else to_canonical(s.cfg, out)
            errors.append(worst(tensor_errors(got, exact[what])))
        (name, error), (_, plain) = errors
        allowed = worst(tensor_errors(moved[what], exact[what]))[1]
        ok = TF32_AT_LEAST * plain <= error <= allowed
        note = f"{error / max(plain, 1e-300):.0f} times float32"
        item = f"{what} as a TPU computes float32, emulated"
        yield Row("device", item, "float32", error, allowed, ok, "" if ok else JAX, note, name)


def _run(side, what: str, weights: Tensors, ids: np.ndarray, targets: np.ndarray) -> Tensors:
    return {"logits": side.logits(weights, ids)} if what == "logits" else side.loss_and_grads(weights, ids, targets)[1]
