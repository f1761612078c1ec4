"""Cross-entropy whose logits are made in parts, one after the other, and its gradients with them.

B batch, T positions, D hidden_size, V vocab_size.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.fast.products import flat_linear
from jax_llm.layers import upcast
from jax_llm.loss import IGNORE_INDEX, cross_entropy
from jax_llm.model import CausalLM
from jax_llm.params import Params, head_weight


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """`mean_loss` whose logits are made in `chunks` parts."""

    chunks: int

    def __call__(self, model: CausalLM, params: Params, inputs: Array, targets: Array, count: Array) -> Array:
        x: Any = model.apply({"params": params}, inputs, method=lambda model, ids: model.model(ids)[0])  # (B, T, D)
        return chunked_cross_entropy(x, head_weight(params), targets, count, self.chunks)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(x: Array, weight: Array, targets: Array, count: Array, chunks: int) -> Array:
    """`cross_entropy` of the logits flat_linear(x, weight), T / chunks positions at a time: all logits never exist.

    x (B, T, D), weight (V, D) of the head, targets (B, T). Gradients are computed in the same pass, so each logit is
    computed once. The gradient of weight is summed over the chunks in float32.
    """
    return _chunks_forward(x, weight, targets, count, chunks)[0]


def _chunks_forward(x: Array, weight: Array, targets: Array, count: Array, chunks: int):
    def add(sums: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, d_weight), (x, targets) = sums, chunk
        logits = flat_linear(x, weight)
        d_logits = d_cross_entropy(logits, targets, count)
        d_weight = d_weight + upcast(jnp.einsum("btv,btd->vd", d_logits, x))
        return (total + cross_entropy(logits, targets, count), d_weight), d_logits @ weight

    cut = lambda x: x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)  # (chunks, B, T / chunks, ...)
    d_weight = jnp.zeros_like(upcast(weight))
    sums, d_x = jax.lax.scan(add, (jnp.zeros((), d_weight.dtype), d_weight), (cut(x), cut(targets)))
    total, d_weight = sums
    return total, (d_x.swapaxes(0, 1).reshape(x.shape), d_weight.astype(weight.dtype))


def _chunks_backward(chunks: int, grads: tuple[Array, Array], g: Array):
    return *((g * d).astype(d.dtype) for d in grads), None, None


chunked_cross_entropy.defvjp(_chunks_forward, _chunks_backward)


def d_cross_entropy(logits: Array, targets: Array, count: Array) -> Array:
    """The gradient of `cross_entropy` for its logits: (..., V) in their dtype.

    (softmax - one hot) / count; 0 where the target is -100.
    """
    probs = jax.nn.softmax(upcast(logits), axis=-1)
    hot = targets[..., None] == jnp.arange(logits.shape[-1])
    counted = (targets != IGNORE_INDEX)[..., None]
    return (jnp.where(counted, probs - hot, 0.0) / jnp.maximum(count, 1)).astype(logits.dtype)
