"""Several documents in one sequence, none of which sees another: where attention may look, and positions that begin anew.

B batch, T positions.
"""

import jax.numpy as jnp
from jax import Array

from jax_llm.attention import causal_mask


def inside_documents(
    input_ids: Array, separator: int | tuple[int, ...], window: int | None = None
) -> tuple[Array, Array]:
    """Positions within their documents (B, T) and a mask (B, 1, T, T), True where a query may look, for ids (B, T).

    `separator` is the id, or one of several, that ends a document and still belongs to it. A query sees the last `window`
    positions of its document, its own included.
    """
    separators = (separator,) if isinstance(separator, int) else separator
    ends = jnp.stack([input_ids == x for x in separators]).any(axis=0).astype(jnp.int32)  # (B, T)
    documents = jnp.cumsum(ends, axis=1) - ends  # (B, T): how many have ended before
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    t = jnp.arange(input_ids.shape[1])
    positions = (same & causal_mask(t, t)).sum(axis=-1) - 1
    return positions, (same & causal_mask(t, t, window))[:, None]
