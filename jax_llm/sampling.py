"""From logits to a token: temperature, top-k, top-p, min-p, then a Gumbel-max draw with counter-based random bits.

B batch, V vocab_size. A draw depends on (seed, row, position) alone, so a text does not depend on its batch mates.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm import random_bits
from jax_llm.layers import upcast
from llm_common.config import SamplingConfig


def filter_logits(logits: Array, cfg: SamplingConfig) -> Array:
    """logits (B, V) divided by the temperature, with the tokens that a filter excludes at -inf, in float32.

    top-k keeps exactly k (ties: lowest id). top-p keeps the shortest prefix of the stable descending order whose
    probability, renormalised after top-k, reaches p; the token that crosses p is kept. min-p keeps the tokens with at
    least min_p times the largest probability. Sources: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751 (top-p);
    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082 (min-p).
    """
    logits = upcast(logits) / cfg.temperature
    if cfg.top_k == 0 and cfg.top_p == 1.0 and cfg.min_p == 0.0:
        return logits
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    keep = jnp.ones(ranked.shape, bool)
    if cfg.top_k > 0:
        keep &= jnp.arange(ranked.shape[-1]) < cfg.top_k
    probs = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    if cfg.top_p < 1.0:
        keep &= jnp.cumsum(probs, axis=-1) - probs < cfg.top_p  # the mass before this token has not reached p
    if cfg.min_p > 0.0:
        keep &= probs >= cfg.min_p * probs[..., :1]
    keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)  # back to the order of the ids
    return jnp.where(keep, logits, -jnp.inf)


def gumbel_noise(key: Array, rows: Array, positions: Array, vocab_size: int, dtype=jnp.float32) -> Array:
    """-log(-log u) for each of B (row, position) pairs and each token id: (B, V)."""

    def one(row: Array, position: Array) -> Array:
        token_key = random_bits.fold_in(random_bits.fold_in(key, row), position)
        return random_bits.uniform(random_bits.random_bits(token_key, vocab_size), dtype)

    return -jnp.log(-jnp.log(jax.vmap(one)(rows, positions)))


def sample(logits: Array, cfg: SamplingConfig, key: Array, rows: Array, positions: Array) -> Array:
    """Token ids (B,) for logits (B, V). Greedy at temperature 0, ties to the lowest id.

    rows (B,): a text's number, which is its row in the batch; positions (B,): the position of the token drawn.
    The argmax of logits + Gumbel noise is a draw from softmax(logits): no cumulative sum, whose rounding would decide.
    """
    if cfg.temperature == 0.0:
        return jnp.argmax(upcast(logits), axis=-1)
    filtered = filter_logits(logits, cfg)
    noise = gumbel_noise(key, rows, positions, logits.shape[-1], filtered.dtype)
    return jnp.argmax(filtered + noise, axis=-1)
