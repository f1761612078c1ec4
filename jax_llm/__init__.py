"""The language model as pure functions: arrays in, arrays out; thin Flax Linen modules only name the weights.

Read in this order: layers, rope, attention, model, loss, optim, sampling. The twin of every file is in `torch_llm`.
"""

import jax

# The random bits of every version and device: pinned, because a default that changes would change every seed.
jax.config.update("jax_threefry_partitionable", True)
