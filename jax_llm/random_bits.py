"""threefry2x32 random bits. JAX has them built in; its twin shows what is inside. Keys are arguments, never state."""

import jax
import jax.numpy as jnp
from jax import Array


def key(seed: int | Array) -> Array:
    """The key of a seed in [0, 2^32)."""
    return jax.random.key(seed, impl="threefry2x32")


def fold_in(key: Array, data: int | Array) -> Array:
    """A new key from a key and an integer."""
    return jax.random.fold_in(key, data)


def random_bits(key: Array, n: int) -> Array:
    """n random words, uint32 (n,)."""
    return jax.random.bits(key, (n,), jnp.uint32)


def uniform(bits: Array, dtype=jnp.float32) -> Array:
    """Numbers in (0, 1) from the upper 23 bits, at the middle of each cell: never 0 and exact in float32."""
    return ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23
