"""The mean loss of a batch and its gradients, in micro-batches if a batch is too large.

    here                                   torch_llm.engine.gradients
    gradients are returned                 gradients are left in the parameters
    a scan adds up micro-batches           a loop and a hook add up micro-batches

B batch, T positions.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.fast.layers import Layers
from jax_llm.layers import upcast
from jax_llm.loss import IGNORE_INDEX
from jax_llm.model import CausalLM
from jax_llm.params import Params, restack, unstack


def cast(params: Params, dtype) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def loss_and_grads(
    model: CausalLM,
    params: Params,
    inputs: Array,
    targets: Array,
    accumulation_steps: int = 1,
) -> tuple[Array, Params]:
    """Mean loss of a batch and its gradient, in the dtype of `params`. inputs, targets: (B, T).

    The layers are sliced before differentiating and the gradients stacked after: the gradient of a slice would be a
    whole stack of zeros with one slice filled, once for every layer. With accumulation the batch is cut into
    `accumulation_steps` micro-batches, one after the other; the gradients are added up in float32, and the mean is over
    all counted tokens of the batch.
    """
    count = (targets != IGNORE_INDEX).sum()
    scanned = isinstance(model.kernels.layers, Layers) and model.kernels.layers.scan
    sliced = params if scanned else unstack(params)
    loss_and_grad = jax.value_and_grad(lambda params, *batch: model.kernels.loss(model, params, *batch, count))
    if accumulation_steps == 1:
        loss, grads = loss_and_grad(sliced, inputs, targets)
        return loss, grads if scanned else restack(grads)

    def add(total: tuple[Array, Params], micro_batch: tuple[Array, Array]):
        return jax.tree.map(lambda a, x: a + x.astype(a.dtype), total, loss_and_grad(sliced, *micro_batch)), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, upcast(p[:0]).dtype), sliced)
    zero_loss = jnp.zeros((), upcast(params["model"]["norm"]["weight"]).dtype)
    cut = lambda x: x.reshape(accumulation_steps, -1, x.shape[1])  # (A, B / A, T)
    (loss, grads), _ = jax.lax.scan(add, (zero_loss, zero), (cut(inputs), cut(targets)))
    return loss, grads if scanned else restack(grads)
