"""Canonical tensors to parameter trees and back, and the same for a whole training state.

Every array that comes in is copied: `jax.device_put` may alias NumPy memory on a CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils

from jax_llm.engine.train import TrainState
from jax_llm.optim import make_optimizer
from jax_llm.params import Leaf, Params, get_canonical, param_leaves
from llm_common.config import ModelConfig, OptimizerConfig
from llm_common.run.checkpoint import TrainingState
from llm_common.tensors import Tensors, check_tensors, tensor_shapes


def from_canonical(cfg: ModelConfig, weights: Tensors, dtype=None) -> Params:
    """The parameter tree of canonical weights, in their dtype or the given one.

    Weights that lie in files are read one by one, and written into the stack of the layers where they belong: beside
    the tree there is never more than one tensor in memory.
    """
    check_tensors(cfg, weights, "weights")

    def array(leaf: Leaf) -> Array:
        first = jnp.array(weights[leaf.names[0]], dtype, copy=True)
        if not leaf.stacked:
            return first
        stack = jnp.zeros((len(leaf.names), *first.shape), first.dtype)
        for i, name in enumerate(leaf.names):
            stack = _put(stack, first if i == 0 else jnp.array(weights[name], dtype, copy=True), i)
        return stack

    return jax.tree.map(array, param_leaves(cfg))


@partial(jax.jit, donate_argnums=0)
def _put(stack: Array, x: Array, i: int | Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)


def to_canonical(cfg: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Canonical tensors, each a NumPy array of its own, from a parameter tree (or a gradient or moment tree)."""
    return {name: to_host(get_canonical(params, name)) for name in tensor_shapes(cfg)}


def to_host(x: Array) -> np.ndarray:
    """x as a NumPy array of its own, whole on every host, however it is cut over their devices."""
    if x.is_fully_addressable:
        return np.array(x)
    return multihost_utils.process_allgather(x, tiled=True)


def to_training_state(cfg: ModelConfig, state: TrainState) -> TrainingState:
    """The framework-free form of a training state. Moments are found by their meaning, not their place in the chain."""
    mu, nu = (to_canonical(cfg, optax.tree_utils.tree_get(state.opt_state, name)) for name in ("mu", "nu"))
    return TrainingState(to_canonical(cfg, state.params), mu, nu, int(state.step), int(state.adam_count))


def from_training_state(cfg: ModelConfig, opt: OptimizerConfig, saved: TrainingState, dtype=jnp.float32) -> TrainState:
    """The state from which `fit` goes on; dtype is that of the masters and moments."""
    params, mu, nu = (from_canonical(cfg, tensors, dtype) for tensors in (saved.weights, saved.mu, saved.nu))
    opt_state = make_optimizer(opt, cfg).init(params)
    opt_state = optax.tree_utils.tree_set(opt_state, mu=mu, nu=nu)
    return TrainState(params, opt_state, jnp.int32(saved.step), jnp.int32(saved.adam_count))
