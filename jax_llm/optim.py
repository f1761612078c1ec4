"""Global-norm clipping and AdamW as optax gradient transformations: pure functions of (gradients, state, parameters).

Any pytree can be trained with them, and `optax.adamw` can take their place in `train_step`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jax_llm.layers import upcast
from jax_llm.params import param_leaves
from llm_common.config import ModelConfig, OptimizerConfig
from llm_common.schedule import StepScalars
from llm_common.tensors import decays, tensor_shapes

Tree = Any


def global_norm(grads: Tree) -> Array:
    """Euclidean norm over all leaves, summed in float32 (float64 for float64); 0 if there is none."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(upcast(g))) for g in jax.tree.leaves(grads)))


def clip_factor(norm: Array, max_norm: float | None) -> Array:
    """What gradients of that global norm are multiplied by: min(1, max_norm / norm). None: 1.

    No epsilon is added to the norm: torch's own function adds 1e-6, which costs five digits of float64 parity.
    """
    return jnp.ones_like(norm) if max_norm is None else jnp.minimum(1.0, max_norm / norm)  # norm 0: min(1, inf)


class AdamWState(NamedTuple):
    """Running means of the gradients and of their squares; trees like the parameters."""

    mu: Tree
    nu: Tree


def clip(max_norm: float | None) -> optax.GradientTransformation:
    """Gradients times `clip_factor` of their global norm, as a gradient transformation without state."""

    def update(updates, state, params=None):
        factor = clip_factor(global_norm(updates), max_norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(
    beta1: float, beta2: float, eps: float, weight_decay: float, decay_mask: Tree | None = None
) -> optax.GradientTransformationExtraArgs:
    """p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the decay on the old p where decay_mask is True.

    `update` takes `scalars`, a `StepScalars`: the learning rate and bias corrections are values of the step, not state.
    decay_mask: a tree of bools; None decays leaves of two or more axes.
    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    def init(params):
        return AdamWState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, *, scalars: StepScalars, **_):
        mask = jax.tree.map(lambda p: p.ndim >= 2, params) if decay_mask is None else decay_mask
        lr, correction1, correction2 = scalars
        mu = jax.tree.map(lambda g, m: beta1 * m + (1.0 - beta1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: beta2 * v + (1.0 - beta2) * g * g, updates, state.nu)

        def delta(m: Array, v: Array, p: Array, decay: bool) -> Array:
            direction = (m / correction1) / (jnp.sqrt(v / correction2) + eps)
            return -lr * (direction + weight_decay * p if decay else direction)

        return jax.tree.map(delta, mu, nu, params, mask), AdamWState(mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def decay_mask(cfg: ModelConfig) -> Tree:
    """Which leaves of the model's parameter tree decay.

    Decided from the canonical tensor: a stacked norm weight has two axes, (L, D), and must not decay.
    """
    shapes = tensor_shapes(cfg)
    return jax.tree.map(lambda leaf: decays(shapes[leaf.names[0]]), param_leaves(cfg))


def make_optimizer(cfg: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
    """The chain that `train_step` runs: clip, then AdamW, in which matrices decay and gains do not."""
    return optax.chain(
        clip(cfg.max_grad_norm), adamw(cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, decay_mask(model))
    )
