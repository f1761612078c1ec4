"""Causal attention with grouped key/value heads.

B batch, T query positions, S key positions, D hidden_size, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_common.config import ModelConfig
from torch_llm.kernels import Kernels
from torch_llm.kv_cache import KVCache
from torch_llm.layers import Linear, RMSNorm, upcast
from torch_llm.rope import apply_rope


class Place(NamedTuple):
    """What attention is told of its queries' positions."""

    cos: Tensor  # of the rotary table, as sin: (T, H/2) or (B, T, H/2)
    sin: Tensor
    mask: Any  # broadcasts to (B, N, T, S), True where a query may look; None: causal, T = S
    window: int | None  # how many of the last positions a causal query sees; None: all


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


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None = None) -> Tensor:
    """True where a query may look at a key, its own or an earlier one: (..., T) and (S,) to (..., T, S).

    With a window only the last `window` positions are seen, the query's own included.
    """
    distance = query_positions[..., :, None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def project_qkv(attention: "Attention", x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, D) to q (B, T, N, H), k and v (B, T, K, H), or to the heads that this device has of them."""
    b, t, _ = x.shape
    q = attention.q_proj(x).reshape(b, t, -1, attention.cfg.head_dim)
    k = attention.k_proj(x).reshape(b, t, -1, attention.cfg.head_dim)
    v = attention.v_proj(x).reshape(b, t, -1, attention.cfg.head_dim)
    return q, k, v


class Attention(nn.Module):
    """The projections around attention."""

    def __init__(self, cfg: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.cfg, self.kernels = cfg, kernels
        n, kv_heads, h, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
        self.q_proj = Linear(d, n * h, kernels.linear, cfg.qkv_bias)
        self.k_proj = Linear(d, kv_heads * h, kernels.linear, cfg.qkv_bias)
        self.v_proj = Linear(d, kv_heads * h, kernels.linear, cfg.qkv_bias)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(h, cfg.rms_norm_eps, kernels.norm)
            self.k_norm = RMSNorm(h, cfg.rms_norm_eps, kernels.norm)
        self.o_proj = Linear(n * h, d, kernels.linear)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.kernels.qkv(self, x)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, S, K, H): the filled slots
        out = self.kernels.attention(q, k, v, place.mask, place.window)  # (B, T, N, H)
        return self.o_proj(out.reshape(b, t, -1))
