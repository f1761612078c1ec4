"""Canonical tensors to modules and back, and the same for a whole training state.

Every array that comes in is copied: `torch.from_numpy` would share memory with its source.
"""

import warnings

import numpy as np
import torch

from llm_common.run.checkpoint import TrainingState
from llm_common.tensors import Tensors, check_tensors, tensor_shapes
from torch_llm.engine.train import Trainer
from torch_llm.layers import upcast
from torch_llm.model import CausalLM


def from_canonical(model: CausalLM, weights: Tensors) -> CausalLM:
    """Copy canonical weights into a model, cast to the model's dtype; returns the model.

    Weights that lie in files are read one by one: beside the model there is never more than one tensor in memory.
    """
    check_tensors(model.cfg, weights, "weights")
    for name, p in model.named_parameters():
        copy(p, weights[name])
    return model


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor, to be read and copied: the two share their memory, which may be a file's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing writes into a view of a file
        return torch.from_numpy(np.asarray(array))


@torch.no_grad()
def copy(p: torch.Tensor, array: np.ndarray) -> None:
    """Write an array into a tensor."""
    p.copy_(as_tensor(array))


def to_canonical(model: CausalLM) -> dict[str, np.ndarray]:
    """Canonical tensors, each a NumPy array of its own, from a model's parameters. A trainer's masters:
    `to_training_state`.
    """
    parameters = dict(model.named_parameters())
    return {name: _array(parameters[name]) for name in tensor_shapes(model.cfg)}


def to_training_state(trainer: Trainer) -> TrainingState:
    """The framework-free form of a trainer's state."""
    trainer.resolve_last_step()
    parameters = dict(trainer.model.named_parameters())
    moments = {name: trainer.optimizer.moments(parameters[name]) for name in tensor_shapes(trainer.cfg)}
    mu, nu = ({name: _array(pair[i]) for name, pair in moments.items()} for i in (0, 1))
    weights = {name: _array(x) for name, x in trainer.masters().items()}
    return TrainingState(weights, mu, nu, trainer.step, trainer.optimizer.count)


def load_weights(trainer: Trainer, weights: Tensors) -> None:
    """Copy canonical weights into a trainer's masters, and rounded into its model."""
    check_tensors(trainer.cfg, weights, "weights")
    for name, p in trainer.model.named_parameters():
        trainer.optimizer.set_master(p, as_tensor(weights[name]))


def from_training_state(trainer: Trainer, saved: TrainingState) -> Trainer:
    """Put a saved state into a trainer, which then goes on from it; returns the trainer."""
    for moment, label in ((saved.mu, "mu"), (saved.nu, "nu")):
        check_tensors(trainer.cfg, moment, label)
    load_weights(trainer, saved.weights)
    for name, p in trainer.model.named_parameters():
        mu, nu = trainer.optimizer.moments(p)
        copy(mu, saved.mu[name])
        copy(nu, saved.nu[name])
    trainer.step, trainer.optimizer.count = saved.step, saved.adam_count
    return trainer


def _array(tensor: torch.Tensor) -> np.ndarray:
    return upcast(tensor.detach()).cpu().numpy().copy()  # NumPy has no bfloat16
