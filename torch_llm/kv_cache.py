"""The key/value cache as an object that owns its buffers and is written in place.

    here                           jax_llm.kv_cache
    KVCache, an object             KVCache, a tuple of arrays
    KVCache(...)                   init_cache(...)
    cache.update(...), in place    cache = update(cache, ...)
    attends to the filled slots,   attends to every slot, the
    a view                         mask hides the empty ones

B batch, S slots, T new positions, K key/value heads, H head_dim.
"""

import torch
from torch import Tensor

from llm_common.config import ModelConfig, check_length


class KVCache:
    """Keys and values of all layers, and how many positions are filled.

    Raises UserError if max_length is more than the RoPE table holds; writing past the end raises IndexError.
    """

    def __init__(
        self, cfg: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        check_length(cfg, max_length, "the KV cache")
        shape = (cfg.num_hidden_layers, batch_size, max_length, cfg.num_key_value_heads, cfg.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, K, H) after the filled positions; returns the filled slots (B, length + T, K, H)."""
        end = self.length + k.shape[1]
        if end > self.k.shape[2]:
            raise IndexError(f"the KV cache has {self.k.shape[2]} slots, position {end - 1} does not fit")
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def advance(self, t: int) -> None:
        """Count t positions as filled, once all layers have written them."""
        self.length += t
