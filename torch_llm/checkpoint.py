"""Canonical tensors to modules and back, and the same for a whole training state.

Every array that comes in is copied: `torch.from_numpy` would share memory with its source.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from torch_llm.layers import upcast
from torch_llm.model import CausalLM
from torch_llm.train import Trainer, select_device


def from_canonical(model: CausalLM, weights: dict[str, np.ndarray]) -> CausalLM:
    """Copy canonical weights into a model, cast to the model's dtype; returns the model."""
    check_tensors(model.cfg, weights, "weights")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(weights[name]))
    return model


def to_canonical(model: CausalLM) -> dict[str, np.ndarray]:
    """Canonical tensors, each a NumPy array of its own, from a model's parameters."""
    parameters = dict(model.named_parameters())
    return {name: _array(parameters[name]) for name in tensor_shapes(model.cfg)}


def to_training_state(trainer: Trainer) -> TrainingState:
    """The framework-free form of a trainer's state."""
    parameters = dict(trainer.model.named_parameters())
    moments = {name: trainer.optimizer.moments(parameters[name]) for name in tensor_shapes(trainer.cfg)}
    mu, nu = ({name: _array(pair[i]) for name, pair in moments.items()} for i in (0, 1))
    return TrainingState(to_canonical(trainer.model), mu, nu, trainer.step, trainer.optimizer.count)


def from_training_state(trainer: Trainer, saved: TrainingState) -> Trainer:
    """Put a saved state into a trainer, which then goes on from it; returns the trainer."""
    for moment, label in ((saved.mu, "mu"), (saved.nu, "nu")):
        check_tensors(trainer.cfg, moment, label)
    from_canonical(trainer.model, saved.weights)
    for name, p in trainer.model.named_parameters():
        mu, nu = trainer.optimizer.moments(p)
        mu.copy_(torch.tensor(saved.mu[name]))
        nu.copy_(torch.tensor(saved.nu[name]))
    trainer.step, trainer.optimizer.count = saved.step, saved.adam_count
    return trainer


def save(run: Path, trainer: Trainer, settings: dict[str, Any], tokenizer: Tokenizer | None = None) -> Path:
    """Write a checkpoint folder into `run` that either framework can resume from."""
    return save_checkpoint(run, trainer.cfg, to_training_state(trainer), {"framework": "torch", **settings}, tokenizer)


def restore(folder: Path, trainer: Trainer) -> Trainer:
    """Read a checkpoint folder, written by either framework. Raises UserError if it is damaged or of another model."""
    _, saved, _ = load_checkpoint(folder, trainer.cfg)
    return from_training_state(trainer, saved)


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
    trainer = Trainer(cfg, train, opt, select_device(device))
    if saved is not None:
        from_training_state(trainer, saved)

    def hook(step: int, trainer: Trainer, metrics: dict[str, float]) -> None:
        if on_step is not None:
            on_step(step, metrics)
        if save_every and step % save_every == 0 and step < opt.total_steps:
            save(run, trainer, settings, tokenizer)

    first_step = trainer.step
    trainer.fit(dataset, on_step=hook)
    if folder is not None and trainer.step == first_step:
        return folder  # nothing was left to do
    return save(run, trainer, settings, tokenizer)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return upcast(tensor.detach()).cpu().numpy().copy()  # NumPy has no bfloat16
