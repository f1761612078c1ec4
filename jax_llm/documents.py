"""Several documents in one sequence: where attention may look, so that no document sees another, and positions that
begin anew.

B batch, T positions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_llm.attention import Place, causal_mask
from jax_llm.kv_cache import KVCache
from jax_llm.model import causal_places
from jax_llm.rope import rotary_table
from llm_common.config import ModelConfig, check_length


def inside_documents(
    input_ids: Array, separator: int | tuple[int, ...], window: int | None = None
) -> tuple[Array, Array]:
    """Positions within their documents (B, T) and a mask (B, 1, T, T), True where a query may look, for ids (B, T).

    `separator` is the id, or one of several, that ends a document and still belongs to it. A query sees the last
    `window` positions of its document, its own included.
    """
    separators = (separator,) if isinstance(separator, int) else separator
    ends = jnp.stack([input_ids == x for x in separators]).any(axis=0).astype(jnp.int32)  # (B, T)
    documents = jnp.cumsum(ends, axis=1) - ends  # (B, T): how many have ended before
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    t = jnp.arange(input_ids.shape[1])
    positions = (same & causal_mask(t, t)).sum(axis=-1) - 1
    return positions, (same & causal_mask(t, t, window))[:, None]


@dataclasses.dataclass(frozen=True)
class DocumentPlaces:
    """The places of layers in which no document of a sequence sees another; with a cache, those of one text."""

    separator: int | tuple[int, ...]  # the id, or several, that ends a document

    def __call__(self, cfg: ModelConfig, input_ids: Array, cache: KVCache | None, dtype) -> Callable[[Any], Place]:
        if cache is not None:
            return causal_places(cfg, input_ids, cache, dtype)
        check_length(cfg, input_ids.shape[1], "the input")
        positions, mask = inside_documents(input_ids, self.separator, cfg.sliding_window)
        cos, sin = (table[positions] for table in rotary_table(cfg, input_ids.shape[1], dtype))
        place = Place(cos, sin, mask, cfg.sliding_window)
        return lambda layer: place
