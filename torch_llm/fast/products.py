"""Matrix products side by side, and a look-up without a backward pass.

B batch, T positions, D hidden_size, F intermediate_size, N query heads, K key/value heads, H head_dim, V vocab_size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_llm.layers import embedding


def lean_embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """`embedding`; without gradients it spares the copy of the whole table, which changes no bit."""
    return embedding(input_ids, weight) if torch.is_grad_enabled() else F.embedding(input_ids, weight)


def fused_qkv(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """`project_qkv` as one product, of weights that `fuse_projections` put side by side."""
    cfg = attention.cfg
    qkv = attention.qkv_proj(x).reshape(*x.shape[:2], -1, cfg.head_dim)
    return qkv.split([cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads], dim=2)


def fused_gate_up(mlp: Any, x: Tensor) -> tuple[Tensor, ...]:
    """`gate_and_up` as one product, of weights that `fuse_projections` put side by side."""
    return mlp.gate_up_proj(x).chunk(2, dim=-1)
