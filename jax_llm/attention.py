"""Causal attention with grouped key/value heads.

B batch, T query positions, S key positions, D hidden_size, N query heads, K key/value heads, G = N / K, H head_dim.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.kv_cache import LayerCache, update
from jax_llm.layers import DType, Linear, RMSNorm, upcast
from jax_llm.rope import apply_rope
from llm_common.config import ModelConfig
from llm_common.cudnn import why_not_cudnn
from llm_common.errors import UserError

Backend = str | Callable[..., Array]  # "reference", "xla", "cudnn", or a function of q, k, v and window


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


def fused_attention(
    q: Array, k: Array, v: Array, mask: Array | None, implementation: Literal["xla", "cudnn"], window: int | None = None
) -> Array:
    """The same through `jax.nn.dot_product_attention`: "xla" on any device, "cudnn" on a GPU in bfloat16.

    With T = S, no mask may let a query look ahead. In decoding without a window a text's one query sees the first
    slots, and cuDNN reads only those.
    """
    if q.dtype == jnp.float64:
        raise UserError(
            "JAX's fused attention computes float64 at float32 accuracy; use attention_backend = 'reference'"
        )
    (t, h), s = (q.shape[1], q.shape[3]), k.shape[1]
    attention = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=h**-0.5, implementation=implementation)
    if mask is None:
        local = None if window is None or window >= t else (window - 1, 0)  # to the left, to the right
        return attention(is_causal=True, local_window_size=local)
    if implementation == "cudnn" and t == 1 and window is None:
        seen = mask.sum(-1, dtype=jnp.int32).reshape(q.shape[0])
        return attention(query_seq_lengths=jnp.ones_like(seen), key_value_seq_lengths=seen)
    if implementation == "cudnn" and t % 2 == s % 2 == 0:  # where T = S, what lies ahead is not computed
        return attention(mask=jnp.expand_dims(mask, range(4 - mask.ndim)), is_causal=t == s)
    return attention(mask=jnp.broadcast_to(mask, (q.shape[0], q.shape[2], t, s)), implementation="xla")


def causal_mask(query_positions: Array, key_positions: Array, window: int | None = None) -> Array:
    """True where a query may look at a key, its own or an earlier one: (..., T) and (S,) to (..., T, S).

    With a window only the last `window` positions are seen, the query's own included.
    """
    distance = query_positions[..., :, None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def dot_product_attention(
    q: Array, k: Array, v: Array, mask: Array | None, backend: Backend, window: int | None = None
) -> Array:
    """Attention by a resolved backend. mask: broadcasts to (B, N, T, S); None is causal, `window` wide."""
    if backend == "reference":
        return reference_attention(q, k, v, mask, window)
    if callable(backend) and mask is None:
        return backend(q, k, v, window)
    if backend in ("xla", "cudnn") or callable(backend):
        return fused_attention(q, k, v, mask, "cudnn" if backend == "cudnn" else "xla", window)
    raise UserError(f"attention backend {backend!r} is unknown; known: reference, xla, cudnn; splash needs --mesh")


def resolve_backend(setting: str, platform: str, compute_dtype: str, cfg: ModelConfig, seq_len: int) -> str:
    """The backend for a setting ("auto", "reference", "fused" or "splash") on a platform ("cpu", "gpu" or "tpu").

    Resolved once, outside the model: a program compiled ahead of time for another device must not ask the default one.
    seq_len 0: for decoding.
    """
    if setting == "splash":
        if platform != "tpu" or compute_dtype == "float64" or seq_len % 128:
            raise UserError(
                "attention_backend = 'splash' is for a TPU, float32 or bfloat16, and a seq_len of a multiple of 128; "
                f"here: {platform}, {compute_dtype}, {seq_len}; use 'auto'"
            )
        return "splash"
    if setting == "reference" or (setting == "auto" and (platform == "cpu" or compute_dtype == "float64")):
        return "reference"
    if compute_dtype == "float64":
        raise UserError("attention_backend = 'fused' with compute_dtype = 'float64': use 'reference' or 'auto'")
    return "cudnn" if platform == "gpu" and not why_not_cudnn(cfg, compute_dtype, seq_len) else "xla"


class Attention(nn.Module):
    """The projections around attention. Returns the output and, if one came in, the new cache of this layer."""

    cfg: ModelConfig
    backend: Backend = "reference"
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        mask: Array | None = None,
        cache: LayerCache | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, LayerCache | None]:
        cfg, dtype, bias = self.cfg, self.param_dtype, self.cfg.qkv_bias
        n, kv_heads, h = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        b, t, d = x.shape
        if self.has_variable("params", "qkv_proj"):  # one product in the place of three: see `fuse_projections`
            qkv = Linear((n + 2 * kv_heads) * h, dtype, bias, name="qkv_proj")(x).reshape(b, t, -1, h)
            q, k, v = jnp.split(qkv, [n, n + kv_heads], axis=2)
        else:
            q = Linear(n * h, dtype, bias, name="q_proj")(x).reshape(b, t, n, h)
            k = Linear(kv_heads * h, dtype, bias, name="k_proj")(x).reshape(b, t, kv_heads, h)
            v = Linear(kv_heads * h, dtype, bias, name="v_proj")(x).reshape(b, t, kv_heads, h)
        if cfg.qk_norm:
            q = RMSNorm(cfg.rms_norm_eps, dtype, name="q_norm")(q)
            k = RMSNorm(cfg.rms_norm_eps, dtype, name="k_norm")(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            assert positions is not None, "a cache needs the positions to write at"
            k, v = cache = update(cache, k, v, positions)  # (B, S, K, H): all slots, the mask hides the empty ones
        out = dot_product_attention(q, k, v, mask, self.backend, cfg.sliding_window)  # (B, T, N, H)
        return Linear(d, dtype, name="o_proj")(out.reshape(b, t, n * h)), cache
