"""Which tensor is the first that is not finite: what a run says before it ends.

here                                   jax_llm.engine.diagnose
torch's forward hook sees a module     flax's interceptor sees it
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llm_common.tensors import tensor_shapes
from torch_llm.engine.gradients import loss_and_grads
from torch_llm.loss import cross_entropy
from torch_llm.model import CausalLM


@torch.no_grad()
def first_not_finite(model: CausalLM, inputs: Tensor, targets: Tensor) -> str:
    """Which tensor is the first that is not finite: a weight, else a module's output in the order in which they are
    computed, else the loss, else a gradient in the order of the backward pass. For people; runs the model once more,
    uncompiled.
    """
    parameters, names = dict(model.named_parameters()), list(tensor_shapes(model.cfg))
    for name in names:
        if not finite(parameters[name]):
            return f"the weight {name} is the first tensor that is not finite"
    logits, found = watch_outputs(model, lambda: model(inputs))
    if found:
        return f"{found}; all weights are finite"
    if not finite(cross_entropy(logits, targets)):
        return "the loss is the first tensor that is not finite; all logits are finite"
    with torch.enable_grad():
        loss_and_grads(model, inputs, targets)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for name in reversed(names):
        if name in grads and not finite(grads[name]):
            return f"the gradient of {name} is the first tensor that is not finite; the loss is finite"
    return "weights, activations, loss and gradients are finite now: the norm overflowed"


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def watch_outputs(model: CausalLM, forward: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """What a forward pass gives, and which module's output is the first in it that is not finite, for people ("":
    none).
    """
    found: list[str] = []

    def look(name: str):
        def hook(module, args, out):
            if not finite(out) and not found:
                found.append(name or "the model")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        logits = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, f"the output of {found[0]} is the first tensor that is not finite" if found else ""
