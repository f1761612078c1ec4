"""The key/value cache as a value: it goes into the model and comes out of it, one position longer.

Every text of a batch has a length of its own: prompts are padded on the right, and what the padding left in the cache
is hidden by the mask until the text's own tokens replace it.

    here                           torch_llm.kv_cache
    KVCache, a tuple of arrays     KVCache, an object that owns its buffers
    init_cache(...)                KVCache(...)
    cache = update(cache, ...)     cache.update(...), in place
    attends to every slot, the     attends to the filled slots, a view
    mask hides the empty ones

B batch, S slots, T new positions, K key/value heads, H head_dim.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from llm_common.config import ModelConfig, check_length


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (B, S, K, H)."""

    k: Array
    v: Array


class KVCache(NamedTuple):
    """The caches of all layers and how many positions of each text are filled, int32 (B,)."""

    layers: tuple[LayerCache, ...]
    length: Array


def init_cache(cfg: ModelConfig, batch_size: int, max_length: int, dtype) -> KVCache:
    """An empty cache with max_length slots. Raises UserError if that is more than the RoPE table holds."""
    check_length(cfg, max_length, "the KV cache")
    shape = (batch_size, max_length, cfg.num_key_value_heads, cfg.head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(cfg.num_hidden_layers))
    return KVCache(layers, jnp.zeros((batch_size,), jnp.int32))


def update(cache: LayerCache, k: Array, v: Array, positions: Array) -> LayerCache:
    """The cache with k and v (B, T, K, H) written at the slots `positions` (B, T).

    The caller must leave room: what would be written past the end is dropped.
    """
    at = jnp.arange(k.shape[0])[:, None], positions
    # no slot is written twice: without knowing that, a GPU writes bfloat16 by compare-and-swap
    return LayerCache(cache.k.at[at].set(k, unique_indices=True), cache.v.at[at].set(v, unique_indices=True))
