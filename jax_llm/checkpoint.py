"""Canonical tensors to parameter trees and back, and the same for a whole training state.

Every array that comes in is copied: `jax.device_put` may alias NumPy memory on a CPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_llm.model import Params, build_params
from jax_llm.optim import make_optimizer
from jax_llm.train import TrainState, fit, init_state, select_device, x64
from llm_common.checkpoint import (
    TrainingState,
    load_checkpoint,
    load_resumable,
    run_settings,
    save_checkpoint,
)
from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig
from llm_common.data import TokenDataset
from llm_common.tensors import check_tensors, tensor_shapes
from llm_common.tokenizer import Tokenizer


def from_canonical(cfg: ModelConfig, weights: dict[str, np.ndarray], dtype=None) -> Params:
    """The parameter tree of canonical weights, in their dtype or the given one."""
    check_tensors(cfg, weights, "weights")
    return build_params(cfg, lambda name: jnp.array(weights[name], dtype, copy=True))


def to_canonical(cfg: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Canonical tensors, each a NumPy array of its own, from a parameter tree (or a gradient or moment tree)."""
    tensors = {}
    for name in tensor_shapes(cfg):
        if name.startswith("model.layers."):
            _, _, index, *path = name.split(".")
            path = ["model", "layers", *path]
        else:
            index, path = None, name.split(".")
        leaf = params
        for part in path:
            leaf = leaf[part]
        tensors[name] = np.array(leaf if index is None else leaf[int(index)])
    return tensors


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
    run: Path, cfg: ModelConfig, state: TrainState, settings: dict[str, Any], tokenizer: Tokenizer | None = None
) -> Path:
    """Write a checkpoint folder into `run` that either framework can resume from."""
    return save_checkpoint(run, cfg, to_training_state(cfg, state), {"framework": "jax", **settings}, tokenizer)


def restore(folder: Path, cfg: ModelConfig, opt: OptimizerConfig, dtype=jnp.float32) -> TrainState:
    """Read a checkpoint folder, written by either framework. Raises UserError if it is damaged or of another model."""
    _, saved, _ = load_checkpoint(folder, cfg)
    return from_training_state(cfg, opt, saved, dtype)


def fit_and_save(
    run: Path,
    cfg: ModelConfig,
    train: TrainConfig,
    opt: OptimizerConfig,
    dataset: TokenDataset,
    device: str = "auto",
    tokenizer: Tokenizer | None = None,
    save_every: int | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Path:
    """Train with checkpoints: go on from the newest one in `run`, save every `save_every` steps and at the end.

    Returns the last checkpoint. Raises UserError if the checkpoint there belongs to another run, or the device is absent.
    """
    settings = run_settings(train, opt, dataset, tokenizer)
    folder, saved = load_resumable(run, cfg, settings)
    with jax.default_device(select_device(device)), x64(train.master_dtype):
        if saved is None:
            state = init_state(cfg, train, opt)
        else:
            state = from_training_state(cfg, opt, saved, jnp.dtype(train.master_dtype))

        def hook(step: int, state: TrainState, metrics: dict[str, float]) -> None:
            if on_step is not None:
                on_step(step, metrics)
            if save_every and step % save_every == 0 and step < opt.total_steps:
                save(run, cfg, state, settings, tokenizer)

        first_step = int(state.step)
        state = fit(state, cfg, train, opt, dataset, on_step=hook)
        if folder is not None and int(state.step) == first_step:
            return folder  # nothing was left to do
        return save(run, cfg, state, settings, tokenizer)
