"""Cross-entropy of next tokens.

B batch, T positions, D hidden_size, V vocab_size.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.layers import upcast

IGNORE_INDEX = -100  # a target that is not counted


def cross_entropy_sum(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Sum of -log softmax(logits)[target] in nats over targets != -100, and how many those are.

    logits (..., V), targets (...). Computed in float32. Targets must lie in [0, V) or be -100: that is checked on the
    host, where the data is read.
    """
    assert targets.shape == logits.shape[:-1], f"targets {targets.shape} for logits {logits.shape}"
    logits = upcast(logits)
    counted = targets != IGNORE_INDEX
    safe = jnp.where(counted, targets, 0)
    picked = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(counted, nll, 0.0).sum(), counted.sum()


def cross_entropy(logits: Array, targets: Array, count: Array | None = None) -> Array:
    """Mean over the counted targets, a scalar in nats; 0 with zero gradients if there is none.

    count: how many targets count in the whole batch, if these are a part of it; the parts' results then add up.
    """
    total, own_count = cross_entropy_sum(logits, targets)
    count = own_count if count is None else count
    return total / jnp.maximum(count, 1)
