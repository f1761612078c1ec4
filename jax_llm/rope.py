"""Applying the rotary table of `llm_common.rope`.

B batch, T positions, N heads, H head_dim.
"""

import jax.numpy as jnp
from jax import Array

from jax_llm.layers import upcast
from llm_common.config import ModelConfig
from llm_common.rope import Rotation, rope_table


def rotary_table(cfg: ModelConfig | Rotation, length: int, dtype) -> tuple[Array, Array]:
    """cos and sin of the first `length` positions, each (length, H/2): the float64 table, cast last."""
    cos, sin = rope_table(cfg, length)
    return jnp.asarray(cos, dtype), jnp.asarray(sin, dtype)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (x[i], x[i + H/2]) of x (B, T, N, H) by the angles of cos and sin, (T, H/2) or (B, T, H/2).

    The half-split convention of Hugging Face. Done in float32 and rounded once.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4.2.
    """
    x1, x2 = jnp.split(upcast(x), 2, axis=-1)  # (B, T, N, H/2) each
    cos, sin = cos[..., None, :], sin[..., None, :]  # (T, 1, H/2)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
