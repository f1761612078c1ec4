"""Causal attention with grouped key/value heads.

B batch, T query positions, S key positions, D hidden_size, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.kernels import Kernels
from jax_llm.kv_cache import LayerCache, update
from jax_llm.layers import Linear, RMSNorm, upcast
from jax_llm.rope import apply_rope
from llm_common.config import ModelConfig


class Place(NamedTuple):
    """What attention is told of its queries' positions."""

    cos: Array  # of the rotary table, as sin: (T, H/2) or (B, T, H/2)
    sin: Array
    mask: Array | None  # broadcasts to (B, N, T, S), True where a query may look; None: causal, T = S
    window: int | None  # how many of the last positions a causal query sees; None: all
    slots: Array | None = None  # (B, T): where a cache is written


def reference_attention(q: Array, k: Array, v: Array, mask: Array | None = None, window: int | None = None) -> Array:
    """softmax(q k^T / sqrt(H)) v for q (B, T, N, H) and k, v (B, S, K, H): (B, T, N, H).

    Query head n reads key/value head n // G. `mask` is boolean, True where a query may look, and broadcasts to
    (B, N, T, S); None is causal (T = S) over the last `window` positions. Scores and softmax are float32, the
    probabilities are rounded to v's dtype.
    Source: Vaswani et al. 2017; Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    """
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    if mask is None:
        mask = causal_mask(jnp.arange(t), jnp.arange(s), window)
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)  # (B, T, K, G, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", upcast(q), upcast(k)) * h**-0.5  # (B, K, G, T, S)
    mask = jnp.broadcast_to(mask, (b, n, t, s)).reshape(scores.shape)
    scores = jnp.where(mask, scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def causal_mask(query_positions: Array, key_positions: Array, window: int | None = None) -> Array:
    """True where a query may look at a key, its own or an earlier one: (..., T) and (S,) to (..., T, S).

    With a window only the last `window` positions are seen, the query's own included.
    """
    distance = query_positions[..., :, None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def project_qkv(x: Array, cfg: ModelConfig, linear: Callable) -> tuple[Array, Array, Array]:
    """x (B, T, D) to q (B, T, N, H), k and v (B, T, K, H). Called within a module, which has their weights."""
    b, t, _ = x.shape
    n, kv_heads, h, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.qkv_bias
    q = Linear(n * h, linear, bias, name="q_proj")(x).reshape(b, t, n, h)
    k = Linear(kv_heads * h, linear, bias, name="k_proj")(x).reshape(b, t, kv_heads, h)
    v = Linear(kv_heads * h, linear, bias, name="v_proj")(x).reshape(b, t, kv_heads, h)
    return q, k, v


class Attention(nn.Module):
    """The projections around attention. Returns the output and, if one came in, the new cache of this layer."""

    cfg: ModelConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Array, place: Place, cache: LayerCache | None = None) -> tuple[Array, LayerCache | None]:
        cfg, kernels = self.cfg, self.kernels
        b, t, d = x.shape
        q, k, v = kernels.qkv(x, cfg, kernels.linear)
        if cfg.qk_norm:
            q = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="q_norm")(q)
            k = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="k_norm")(k)
        q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)
        if cache is not None:
            assert place.slots is not None, "a cache needs the slots to write at"
            k, v = cache = update(cache, k, v, place.slots)  # (B, S, K, H): all slots, the mask hides the empty ones
        out = kernels.attention(q, k, v, place.mask, place.window)  # (B, T, N, H)
        return Linear(d, kernels.linear, name="o_proj")(out.reshape(b, t, -1)), cache
