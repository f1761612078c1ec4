"""Attention by other kernels than `reference_attention`, and which of them a device takes.

B batch, T query positions, S key positions, N query heads, K key/value heads, H head_dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jax_llm.attention import reference_attention
from jax_llm.layers import upcast
from llm_common.config import ModelConfig
from llm_common.cudnn import why_not_cudnn
from llm_common.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """`fused_attention` of one implementation, as a model's kernel."""

    implementation: Literal["xla", "cudnn"]

    def __call__(self, q: Array, k: Array, v: Array, mask: Array | None = None, window: int | None = None) -> Array:
        return fused_attention(q, k, v, mask, self.implementation, window)


def splash_attention(q: Array, k: Array, v: Array, window: int | None = None, interpret: bool = False) -> Array:
    """Attention by the TPU's blockwise kernel, which never holds the scores of all pairs; causal, T a multiple of 128.

    q (B, T, N, H) and k, v (B, T, K, H) to (B, T, N, H), as `reference_attention`.

    interpret: on a CPU, to check its numbers. Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # a TPU's own: only there is it needed

    t, n, h = q.shape[1:]
    mask = splash.CausalMask((t, t)) if window is None else splash.LocalMask((t, t), (window - 1, 0), offset=0)
    block = next(size for size in (512, 256, 128) if t % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * n),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = (upcast(q) * h**-0.5).astype(q.dtype)  # the kernel scales nothing
    out: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)))  # (B, heads, T, H)
    return out.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """`splash_attention`, which the compiler cannot shard, sharded over a mesh by rows and heads; with a mask,
    XLA's.
    """

    mesh: Mesh
    heads: PartitionSpec  # of (B, T, heads, H)

    def __call__(self, q: Array, k: Array, v: Array, mask: Array | None = None, window: int | None = None) -> Array:
        if mask is not None:
            return fused_attention(q, k, v, mask, "xla", window)
        local = functools.partial(splash_attention, window=window)
        shard_map = jax.shard_map(
            local, mesh=self.mesh, in_specs=(self.heads,) * 3, out_specs=self.heads, check_vma=False
        )
        return shard_map(q, k, v)


def needs_mesh(*_: Any) -> Array:
    """In the place of a kernel that works on a mesh alone."""
    raise UserError("attention_backend = 'splash' needs `mesh`; use 'auto' without one")


def attention_kernel(backend: str) -> Callable[..., Array]:
    """The function of a resolved backend: "reference", "xla", "cudnn" or "splash"."""
    known = {
        "reference": reference_attention,
        "xla": FusedAttention("xla"),
        "cudnn": FusedAttention("cudnn"),
        "splash": needs_mesh,
    }
    if backend not in known:
        raise UserError(f"attention backend {backend!r} is unknown; known: {', '.join(known)}")
    return known[backend]


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
