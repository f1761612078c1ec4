"""Parameter trees: which canonical tensors their leaves hold. Layers are stacked on a leading L axis, or a tuple of L
trees.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from llm_common.config import ModelConfig
from llm_common.tensors import tensor_shapes

Params = Any  # a tree of arrays
LAYERS = "model.layers."


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The canonical tensors that a leaf of the parameter tree holds: one, or that of every layer, stacked on L."""

    names: tuple[str, ...]
    stacked: bool


def param_leaves(cfg: ModelConfig) -> Params:
    """The parameter tree of a config with a `Leaf` in the place of each array."""
    tree: dict[str, Any] = {}
    for name in tensor_shapes(cfg):
        leaf = Leaf((name,), stacked=False)
        if name.startswith(LAYERS):
            _, _, suffix = name.removeprefix(LAYERS).partition(".")
            leaf = Leaf(tuple(f"{LAYERS}{i}.{suffix}" for i in range(cfg.num_hidden_layers)), stacked=True)
            name = LAYERS + suffix
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def get_canonical(params: Params, name: str) -> Array:
    """The tensor of a parameter tree (or a gradient or moment tree) that has a canonical name."""
    path, index = name.split("."), None
    if name.startswith("model.layers."):
        index = int(path.pop(2))
    leaf = params
    for part in path:
        leaf = leaf[part]
    return leaf if index is None else leaf[index]


def slice_layers(layers: Params) -> tuple[Params, ...]:
    """The trees of the single layers, from a tree stacked on L (or from what is such a tuple already)."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


def stack_layers(layers: tuple[Params, ...]) -> Params:
    """The inverse of `slice_layers`."""
    return jax.tree.map(lambda *w: jnp.stack(w), *layers)


def unstack(params: Params) -> Params:
    """The parameter tree with `layers` as a tuple of L trees."""
    model = params["model"]
    return {**params, "model": {**model, "layers": slice_layers(model["layers"])}}


def restack(params: Params) -> Params:
    """The inverse of `unstack`."""
    model = params["model"]
    return {**params, "model": {**model, "layers": stack_layers(model["layers"])}}


def head_weight(params: Params) -> Array:
    """The head's matrix (V, D): its own, or the embedding's if it is tied."""
    return params["lm_head"]["weight"] if "lm_head" in params else params["model"]["embed_tokens"]["weight"]
