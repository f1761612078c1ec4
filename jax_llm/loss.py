"""Cross-entropy of next tokens.

B batch, T positions, D hidden_size, V vocab_size.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.layers import linear, upcast

IGNORE_INDEX = -100  # a target that is not counted


def cross_entropy_sum(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Sum of -log softmax(logits)[target] in nats over targets != -100, and how many those are.

    logits (..., V), targets (...). Computed in float32. Targets must lie in [0, V) or be -100: that is checked on the
    host, where the data is read.
    """
    logits = upcast(logits)
    counted = targets != IGNORE_INDEX
    safe = jnp.where(counted, targets, 0)
    picked = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(counted, nll, 0.0).sum(), counted.sum()


def cross_entropy(logits: Array, targets: Array, count: Array | None = None) -> Array:
    """Mean over the counted targets, a scalar in nats; 0 with zero gradients if there is none.

    count: how many targets count in the whole batch, of which these may be a part; the parts' results then add up.
    """
    total, own_count = cross_entropy_sum(logits, targets)
    count = own_count if count is None else count
    return total / jnp.maximum(count, 1)


def chunked_cross_entropy(x: Array, weight: Array, targets: Array, count: Array, chunks: int) -> Array:
    """`cross_entropy` of the logits linear(x, weight), which are made for T / chunks positions at a time and are never all there.

    x (B, T, D), weight (V, D) of the head, targets (B, T). The backward pass makes the logits again, and sums the gradient of
    weight over the chunks in float32.
    """
    weight = upcast(weight)

    @jax.checkpoint
    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x, targets = chunk
        return total + cross_entropy(linear(x, weight.astype(x.dtype)), targets, count), None

    cut = lambda x: x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)  # (chunks, B, T / chunks, ...)
    return jax.lax.scan(add, jnp.zeros((), weight.dtype), (cut(x), cut(targets)))[0]
