"""Matrix products in another form: flattened, side by side, or kept apart from what follows.

B batch, T positions, D hidden_size, F intermediate_size, N query heads, K key/value heads, H head_dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.layers import Linear, gate_and_up
from llm_common.config import ModelConfig


def flat_linear(x: Array, weight: Array) -> Array:
    """`linear`, with x flattened to 2-D first in float32 and float64.

    Otherwise the weight gradient contracts batch and time, and XLA's CPU backend copies both operands.
    """
    rows = x if x.dtype == jnp.bfloat16 else x.reshape(-1, x.shape[-1])
    return jnp.einsum("...d,fd->...f", rows, weight).reshape(*x.shape[:-1], weight.shape[0])


def fused_qkv(x: Array, cfg: ModelConfig, linear: Callable) -> tuple[Array, Array, Array]:
    """`project_qkv` as one product, of weights that `fuse_projections` put side by side."""
    n, kv_heads, h = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    qkv = Linear((n + 2 * kv_heads) * h, linear, cfg.qkv_bias, name="qkv_proj")(x).reshape(*x.shape[:2], -1, h)
    q, k, v = jnp.split(qkv, [n, n + kv_heads], axis=2)
    return q, k, v


def fused_gate_up(x: Array, features: int, linear: Callable) -> tuple[Array, Array]:
    """`gate_and_up` as one product, of weights that `fuse_projections` put side by side."""
    gate, up = jnp.split(Linear(2 * features, linear, name="gate_up_proj")(x), 2, axis=-1)
    return gate, up


def separated_gate_up(x: Array, features: int, linear: Callable) -> tuple[Array, Array]:
    """`gate_and_up` for GPUs: XLA fuses the gradients of the two only if they are not the direct outputs of a
    product.
    """
    return jax.lax.optimization_barrier(gate_and_up(x, features, linear))
