"""The key/value cache as an object that owns its buffers and is written in place.

Every text of a batch has a length of its own: prompts are padded on the right, and what the padding left in the cache
is hidden by the mask until the text's own tokens replace it.

    here                           jax_llm.kv_cache
    KVCache, an object             KVCache, a tuple of arrays
    KVCache(...)                   init_cache(...)
    cache.update(...), in place    cache = update(cache, ...)
    attends to the filled slots,   attends to every slot, the
    a view, or as in JAX if static mask hides the empty ones

B batch, S slots, T new positions, K key/value heads, H head_dim.
"""

import torch
from torch import Tensor

from llm_common.config import ModelConfig, check_length


class KVCache:
    """Keys and values of L layers, each (B, S, K, H), and how many positions of each text are filled, (B,).

    `filled` is the largest of the lengths, on the host. A static cache is attended to as a whole and counts nothing on
    the host, so that a step that uses it can be captured and played again. Raises UserError for more slots than the
    RoPE table holds.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        static: bool = False,
    ) -> None:
        check_length(cfg, max_length, "the KV cache")
        shape = (batch_size, max_length, cfg.num_key_value_heads, cfg.head_dim)
        # one buffer for each layer: the compiler would copy the whole of a common one to change a part of it
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.num_hidden_layers)]
        self.slots = max_length
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.filled, self.static = 0, static

    def in_use(self, t: int) -> int:
        """How many slots the next t tokens may look at."""
        return self.slots if self.static else self.filled + t

    def positions(self, t: int) -> Tensor:
        """Where the next t tokens of each text go: (B, T)."""
        if self.in_use(t) > self.slots:
            raise IndexError(f"the KV cache has {self.slots} slots, position {self.filled + t - 1} does not fit")
        return self.length[:, None] + torch.arange(t, device=self.length.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, K, H) after the filled positions; returns the slots in use (B, S, K, H)."""
        positions = self.positions(k.shape[1])
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer][rows, positions] = k
        self.v[layer][rows, positions] = v
        end = self.in_use(k.shape[1])
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def advance(self, t: int) -> None:
        """Count t positions of each text as filled, once all layers have written them."""
        self.length.add_(t)
        if not self.static:
            self.filled += t

    def set_length(self, length: Tensor) -> None:
        """Say how many positions (B,) of each text are its own, after a padded prompt."""
        self.length.copy_(length)
