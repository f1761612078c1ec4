"""What a model may be given in the place of its plain functions.

A model is (config, kernels). The lesson reads `jax_llm.model.PLAIN`, the kernels that every other file of it defines.
`fast/` has others with the same numbers, and a family of models replaces those in which its mathematics differ.

A kernel is a function or a frozen dataclass that can be called, never a closure: two equal models must be one compiled
program.

B batch, T query positions, S key positions, D hidden_size, N query heads, K key/value heads, H head_dim, F
intermediate_size, V vocab_size, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions of a model, each with the shapes of its plain form."""

    linear: Callable[[Array, Array], Array]  # x (..., D), weight (F, D): (..., F)
    embedding: Callable[[Array, Array], Array]  # ids (B, T), weight (V, D): (B, T, D)
    norm: Callable[[Array, Array, float], Array]  # x (..., D), gain (D,), eps: (..., D)
    activation: Callable[[Array, Array], Array]  # gate and up (B, T, F): (B, T, F)
    attention: Callable[..., Array]  # q (B, T, N, H), k and v (B, S, K, H), mask, window: (B, T, N, H)
    qkv: Callable[..., tuple[Array, Array, Array]]  # x (B, T, D), config, linear: q (B, T, N, H), k and v (B, T, K, H)
    gate_up: Callable[..., tuple[Array, Array]]  # x (B, T, D), F, linear: gate and up (B, T, F)
    places: Callable[..., Callable[[Any], Any]]  # config, ids (B, T), cache, dtype: the `Place` of each layer
    block: Callable[..., Any]  # the module class of a layer
    layers: Callable[..., tuple[Array, Any]]  # apply, the layers' weights, x (B, T, D), cache: x and the new cache
    loss: Callable[..., Array]  # model, weights, inputs and targets (B, T), count: a scalar in nats
