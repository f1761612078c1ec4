"""Causal attention with grouped key/value heads.

B batch, T query positions, S key positions, D hidden_size, N query heads, K key/value heads, G = N / K, H head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llm_common.config import ModelConfig
from llm_common.errors import UserError
from torch_llm.kv_cache import KVCache
from torch_llm.layers import Linear, RMSNorm, upcast
from torch_llm.rope import apply_rope

Mask = Tensor | BlockMask | None  # None: causal


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v for q (B, T, N, H) and k, v (B, S, K, H): (B, T, N, H).

    Query head n reads key/value head n // G. `mask` is boolean, True where a query may look, and broadcasts to
    (B, N, T, S); None is causal (T = S) over the last `window` positions. Scores and softmax are float32, the
    probabilities are rounded to v's dtype.
    Source: Vaswani et al. 2017; Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    """
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    if mask is None:
        mask = causal_mask(torch.arange(t, device=q.device), torch.arange(s, device=q.device), window)
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)  # (B, T, K, G, H)
    scores = torch.einsum("btkgh,bskh->bkgts", upcast(q), upcast(k)) * h**-0.5  # (B, K, G, T, S)
    mask = torch.broadcast_to(mask, (b, n, t, s)).reshape(scores.shape)
    scores = torch.where(mask, scores, -torch.inf)
    probs = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None = None) -> Tensor:
    """The same through `F.scaled_dot_product_attention`, which picks the device's fastest kernel.

    A BlockMask goes to FlexAttention, which skips the blocks that it hides.
    """
    if mask is None and window is not None and window < q.shape[1]:  # the function knows no window
        positions = torch.arange(q.shape[1], device=q.device)
        mask = causal_mask(positions, positions, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, H)
    scale = q.shape[-1] ** -0.5
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def takes_blocks(backend: str, platform: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a compiled program should use FlexAttention's BlockMask.

    Uncompiled FlexAttention is slow; compiled, it has no float64.
    """
    return backend == "sdpa" and platform == "cuda" and dtype == torch.bfloat16 and head_dim in (16, 32, 64, 128)


def in_blocks(mask: Tensor) -> BlockMask:
    """A mask (B, 1, T, S), True where a query may look, in blocks: those of which nothing is seen, all or a part."""
    b, _, t, s = mask.shape
    return create_block_mask(lambda b, h, i, j: mask[b, 0, i, j], b, None, t, s, device=mask.device)


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None = None) -> Tensor:
    """True where a query may look at a key, its own or an earlier one: (..., T) and (S,) to (..., T, S).

    With a window only the last `window` positions are seen, the query's own included.
    """
    distance = query_positions[..., :, None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str, window: int | None = None
) -> Tensor:
    """Attention by a resolved backend: "reference" or "sdpa".

    mask: broadcasts to (B, N, T, S); None is causal, `window` wide.
    """
    if backend == "reference":
        assert not isinstance(mask, BlockMask), "blocks are for a fused backend"
        return reference_attention(q, k, v, mask, window)
    if backend == "sdpa":
        return fused_attention(q, k, v, mask, window)
    raise UserError(f"attention backend {backend!r} is unknown; known: reference, sdpa (see resolve_backend)")


def resolve_backend(setting: str, compute_dtype: str) -> str:
    """The backend for a setting: "auto", "reference" or "fused".

    Resolved once, outside the model. float64 takes the reference. The fused function takes any device and shape: where
    cuDNN and flash attention refuse, it falls back to a slower kernel.
    """
    if setting == "splash":
        raise UserError("attention_backend = 'splash' is a kernel for TPUs, in JAX; use 'auto'")
    if setting == "reference" or (setting == "auto" and compute_dtype == "float64"):
        return "reference"
    return "sdpa"


class Attention(nn.Module):
    """The projections around attention."""

    def __init__(self, cfg: ModelConfig, backend: str = "reference") -> None:
        super().__init__()
        n, kv_heads, h, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
        self.n, self.kv_heads, self.h = n, kv_heads, h
        self.backend, self.window = backend, cfg.sliding_window
        self.qkv_proj: Linear | None = None
        self.q_proj = Linear(d, n * h, cfg.qkv_bias)
        self.k_proj = Linear(d, kv_heads * h, cfg.qkv_bias)
        self.v_proj = Linear(d, kv_heads * h, cfg.qkv_bias)
        self.q_norm = RMSNorm(h, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(h, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.o_proj = Linear(n * h, d)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        b, t, _ = x.shape
        if self.qkv_proj is not None:  # one product in the place of three: see `fuse_projections`
            q, k, v = self.qkv_proj(x).reshape(b, t, -1, self.h).split([self.n, self.kv_heads, self.kv_heads], dim=2)
        else:
            q = self.q_proj(x).reshape(b, t, -1, self.h)  # (B, T, N, H), or the heads that this device has of them
            k = self.k_proj(x).reshape(b, t, -1, self.h)  # (B, T, K, H)
            v = self.v_proj(x).reshape(b, t, -1, self.h)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, S, K, H): the filled slots
        out = dot_product_attention(q, k, v, mask, self.backend, self.window)  # (B, T, N, H)
        return self.o_proj(out.reshape(b, t, -1))
