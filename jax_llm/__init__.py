"""The language model as pure functions: arrays in, arrays out; thin Flax Linen modules only name the weights.

Read in this order: layers, rope, attention, model, loss, optim, sampling. The twin of every file is in `torch_llm`.
`engine` trains and generates; `fast` has the same numbers, quicker.
"""

import jax

from jax_llm.kernels import Kernels
from jax_llm.loss import cross_entropy
from jax_llm.model import PLAIN, CausalLM, init_params
from jax_llm.optim import adamw, make_optimizer
from jax_llm.sampling import sample

__all__ = ["PLAIN", "CausalLM", "Kernels", "adamw", "cross_entropy", "init_params", "make_optimizer", "sample"]

# The random bits of every version and device: pinned, because a default that changes would change every seed.
jax.config.update("jax_threefry_partitionable", True)
