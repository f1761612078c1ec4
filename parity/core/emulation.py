"""A TPU's matrix products on a CPU: factors rounded to bfloat16, products and sums in float32.

That is what a TPU does with float32 unless it is asked for more. A CPU accepts the same setting and ignores it, so the
program is run operation by operation, and the factors of every matrix product are rounded on the way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# under what name a primitive that calls a function once holds it; others hold a rule, as a scatter does its sum
CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def with_bfloat16_operands(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, forward and, if it makes them, gradients, with the factors of all matrix products
    rounded.
    """

    def rounded(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return rounded


def _run(program: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip((*program.constvars, *program.invars), (*consts, *args), strict=True))
    for step in program.eqns:
        inputs = [x.val if isinstance(x, Literal) else values[x] for x in step.invars]
        inner = next((x for name, x in step.params.items() if name in CALLED and isinstance(x, ClosedJaxpr)), None)
        if inner is not None and step.primitive.name != "scan":  # a function called by name
            outputs = _run(inner.jaxpr, inner.consts, inputs)
        else:
            if step.primitive.name == "dot_general":
                inputs = [_round(x) for x in inputs]
            outputs = step.primitive.bind(*inputs, **step.params)
            outputs = outputs if step.primitive.multiple_results else [outputs]
        values.update(zip(step.outvars, outputs, strict=True))
    return [x.val if isinstance(x, Literal) else values[x] for x in program.outvars]


def _round(x: Any) -> Any:
    """x with bfloat16's 8 bits of exponent and 7 of mantissa, still float32."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if x.dtype == jnp.float32 else x
