"""Canonical tensors to modules and back, and the same for a whole training state.

Every array that comes in is copied: `torch.from_numpy` would share memory with its source.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_common.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from llm_common.hf_tokenizer import AnyTokenizer
from llm_common.tensors import Tensors, check_tensors, tensor_shapes
from torch_llm.layers import upcast
from torch_llm.model import CausalLM
from torch_llm.train import Trainer


def from_canonical(model: CausalLM, weights: Tensors) -> CausalLM:
    """Copy canonical weights into a model, cast to the model's dtype; returns the model.

    Weights that lie in files are read one by one: beside the model there is never more than one tensor in memory.
    """
    check_tensors(model.cfg, weights, "weights")
    for name, p in model.named_parameters():
        copy(p, weights[name])
    return model


@torch.no_grad()
def copy(p: torch.Tensor, array: np.ndarray) -> None:
    """Write an array into a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array may be a view of a file, which is read and not written
        p.copy_(torch.from_numpy(np.asarray(array)))


def to_canonical(model: CausalLM) -> dict[str, np.ndarray]:
    """Canonical tensors, each a NumPy array of its own, from a model's parameters."""
    parameters = dict(model.named_parameters())
    return {name: _array(parameters[name]) for name in tensor_shapes(model.cfg)}


def to_training_state(trainer: Trainer) -> TrainingState:
    """The framework-free form of a trainer's state."""
    trainer.settle()
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
        copy(mu, saved.mu[name])
        copy(nu, saved.nu[name])
    trainer.step, trainer.optimizer.count = saved.step, saved.adam_count
    return trainer


def save(run: Path, trainer: Trainer, settings: dict[str, Any], tokenizer: AnyTokenizer | None = None) -> Path:
    """Write a checkpoint folder into `run` that either framework can resume from."""
    return save_checkpoint(run, trainer.cfg, to_training_state(trainer), {"framework": "torch", **settings}, tokenizer)


def restore(folder: Path, trainer: Trainer) -> Trainer:
    """Read a checkpoint folder, written by either framework. Raises UserError if it is damaged or of another model."""
    _, saved, _ = load_checkpoint(folder, trainer.cfg)
    return from_training_state(trainer, saved)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return upcast(tensor.detach()).cpu().numpy().copy()  # NumPy has no bfloat16
