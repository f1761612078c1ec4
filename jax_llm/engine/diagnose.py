"""Which tensor is the first that is not finite: what a run says before it ends.

here                                   torch_llm.engine.diagnose
flax's interceptor sees a module       torch's forward hook sees it
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jax_llm.engine.gradients import loss_and_grads
from jax_llm.loss import cross_entropy
from jax_llm.model import CausalLM, run_layers
from jax_llm.params import Params, get_canonical
from llm_common.tensors import tensor_shapes


def first_not_finite(model: CausalLM, params: Params, inputs: Array, targets: Array) -> str:
    """Which tensor is the first that is not finite: a weight, else a module's output in the order in which they are
    computed, else the loss, else a gradient in the order of the backward pass. For people; runs the model once more,
    uncompiled.
    """
    names = list(tensor_shapes(model.cfg))
    for name in names:
        if not finite(get_canonical(params, name)):
            return f"the weight {name} is the first tensor that is not finite"
    logits, found = watch_outputs(model, params, inputs)
    if found:
        return f"{found}; all weights are finite"
    if not finite(cross_entropy(logits, targets)):
        return "the loss is the first tensor that is not finite; all logits are finite"
    _, grads = loss_and_grads(model, params, inputs, targets)
    for name in reversed(names):
        if not finite(get_canonical(grads, name)):
            return f"the gradient of {name} is the first tensor that is not finite; the loss is finite"
    return "weights, activations, loss and gradients are finite now: the norm overflowed"


def finite(x: Array) -> bool:
    return bool(jnp.isfinite(x).all())


def watch_outputs(model: CausalLM, params: Params, inputs: Array) -> tuple[Array, str]:
    """The logits of inputs (B, T), and which module's output is the first that is not finite, for people ("": none)."""
    found: list[str] = []
    path: list[str] = []

    def look(next_fun, args, kwargs, context):
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        path.append((context.module.name or "").replace("layers_", "layers."))
        out = next_fun(*args, **kwargs)
        tensor = out[0] if isinstance(out, tuple) else out
        if not finite(tensor) and not found:
            found.append(".".join(part for part in path if part) or "the model")
        path.pop()
        return out

    with nn.intercept_methods(look):
        one_by_one = dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, layers=run_layers))
        logits, _ = one_by_one.apply({"params": params}, inputs)
    return logits, f"the output of {found[0]} is the first tensor that is not finite" if found else ""
