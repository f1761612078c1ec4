"""Canonical tensors to parameter trees and back, and the same for a whole training state.

Every array that comes in is copied: `jax.device_put` may alias NumPy memory on a CPU.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils

from jax_llm.model import Params, build_params, get_canonical
from jax_llm.optim import make_optimizer
from jax_llm.train import TrainState
from llm_common.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from llm_common.config import ModelConfig, OptimizerConfig
from llm_common.hf_tokenizer import AnyTokenizer
from llm_common.tensors import Tensors, check_tensors, tensor_shapes


def from_canonical(cfg: ModelConfig, weights: Tensors, dtype=None) -> Params:
    """The parameter tree of canonical weights, in their dtype or the given one.

    Weights that lie in files are read one by one, and written into the stack of the layers where they belong: beside the
    tree there is never more than one tensor in memory.
    """
    check_tensors(cfg, weights, "weights")

    def leaf(name: str) -> Array:
        return jnp.array(weights[name], dtype, copy=True)

    def stacked(names: list[str]) -> Array:
        first = leaf(names[0])
        stack = jnp.zeros((len(names), *first.shape), first.dtype)
        for i, name in enumerate(names):
            stack = _put(stack, first if i == 0 else leaf(name), i)
        return stack

    # `build_params` asks for every tensor of a stack at once: it is given the names
    return build_params(cfg, lambda name: name if name.startswith("model.layers.") else leaf(name), stacked)


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


def save(
    run: Path, cfg: ModelConfig, state: TrainState, settings: dict[str, Any], tokenizer: AnyTokenizer | None = None
) -> Path:
    """Write a checkpoint folder into `run` that either framework can resume from."""
    return save_checkpoint(run, cfg, to_training_state(cfg, state), {"framework": "jax", **settings}, tokenizer)


def restore(folder: Path, cfg: ModelConfig, opt: OptimizerConfig, dtype=jnp.float32) -> TrainState:
    """Read a checkpoint folder, written by either framework. Raises UserError if it is damaged or of another model."""
    _, saved, _ = load_checkpoint(folder, cfg)
    return from_training_state(cfg, opt, saved, dtype)
