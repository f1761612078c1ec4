"""What a model may be given in the place of its plain functions.

A model is (config, kernels). The lesson reads `torch_llm.model.PLAIN`, the kernels that every other file of it defines.
`fast/` has others with the same numbers, and a family of models replaces those in which its mathematics differ.

A kernel is a function or a frozen dataclass that can be called, never a closure: two equal models must be one compiled
program.

B batch, T query positions, S key positions, D hidden_size, N query heads, K key/value heads, H head_dim, F
intermediate_size, V vocab_size, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions of a model, each with the shapes of its plain form."""

    linear: Callable[[Tensor, Tensor], Tensor]  # x (..., D), weight (F, D): (..., F)
    embedding: Callable[[Tensor, Tensor], Tensor]  # ids (B, T), weight (V, D): (B, T, D)
    norm: Callable[[Tensor, Tensor, float], Tensor]  # x (..., D), gain (D,), eps: (..., D)
    activation: Callable[[Tensor, Tensor], Tensor]  # gate and up (B, T, F): (B, T, F)
    attention: Callable[..., Tensor]  # q (B, T, N, H), k and v (B, S, K, H), mask, window: (B, T, N, H)
    qkv: Callable[..., tuple[Tensor, ...]]  # the attention module, x (B, T, D): q (B, T, N, H), k and v (B, T, K, H)
    gate_up: Callable[..., tuple[Tensor, ...]]  # the MLP module, x (B, T, D): gate and up (B, T, F)
    places: Callable[
        ..., Callable[..., Callable[[int], Any]]
    ]  # config: (ids (B, T), cache, dtype): the `Place` of each layer
    block: Callable[..., Any]  # the module class of a layer
    layer: Callable[..., Tensor]  # a layer's module, x (B, T, D), its place, cache, its number: x
    loss: Callable[..., Tensor]  # model, inputs and targets (B, T), count: a scalar in nats
