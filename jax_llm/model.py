"""The decoder-only language model, and its initial weights.

B batch, T positions, S cache slots, D hidden_size, V vocab_size, L layers.

Layers live in one tree whose arrays are stacked on a leading L axis; a loop applies one layer's slice after the other.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jax_llm import random_bits
from jax_llm.attention import Attention, Place, causal_mask, project_qkv, reference_attention
from jax_llm.kernels import Kernels
from jax_llm.kv_cache import KVCache, LayerCache
from jax_llm.layers import MLP, Embedding, Linear, RMSNorm, embedding, gate_and_up, linear, rms_norm, swiglu, upcast
from jax_llm.loss import cross_entropy
from jax_llm.params import Params, param_leaves, slice_layers
from jax_llm.rope import rotary_table
from llm_common.config import ModelConfig, check_length
from llm_common.errors import UserError
from llm_common.tensors import init_constant, init_range, tensor_shapes


def causal_places(cfg: ModelConfig, input_ids: Array, cache: KVCache | None, dtype) -> Callable[[Any], Place]:
    """The place of every layer: a query sees what precedes it, in the sequence or the cache. dtype: the table's."""
    t = input_ids.shape[1]
    if cache is None:
        check_length(cfg, t, "the input")
        place = Place(*rotary_table(cfg, t, dtype), None, cfg.sliding_window)
    else:
        slots = cache.layers[0].k.shape[1]
        positions = cache.length[:, None] + jnp.arange(t)  # (B, T)
        cos, sin = (table[positions] for table in rotary_table(cfg, slots, dtype))
        mask = causal_mask(positions, jnp.arange(slots), cfg.sliding_window)[:, None]  # (B, 1, T, S)
        place = Place(cos, sin, mask, cfg.sliding_window, positions)
    return lambda layer: place


def run_layers(apply: Callable, layers: Params, x: Array, cache: KVCache | None) -> tuple[Array, KVCache | None]:
    """Layer after layer: x (B, T, D) and the cache, with the T positions filled.

    apply(i, weights, x, cache of the layer): x and that cache. layers: a tree stacked on L, or a tuple of L trees.
    """
    sliced, new = slice_layers(layers), []
    caches = [None] * len(sliced) if cache is None else cache.layers
    for i, (weights, layer_cache) in enumerate(zip(sliced, caches, strict=True)):
        x, layer_cache = apply(i, weights, x, layer_cache)
        new.append(layer_cache)
    return x, None if cache is None else KVCache(tuple(new), cache.length + x.shape[1])


def mean_loss(model: "CausalLM", params: Params, inputs: Array, targets: Array, count: Array) -> Array:
    """Sum of the losses in nats of inputs and targets (B, T), over `count`."""
    logits, _ = model.apply({"params": params}, inputs)  # (B, T, V)
    return cross_entropy(logits, targets, count)


class DecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: ModelConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Array, place: Place, cache: LayerCache | None = None) -> tuple[Array, LayerCache | None]:
        eps, kernels = self.cfg.rms_norm_eps, self.kernels
        h = RMSNorm(eps, kernels.norm, name="input_layernorm")(x)
        h, cache = Attention(self.cfg, kernels, name="self_attn")(h, place, cache)
        x = x + h
        h = RMSNorm(eps, kernels.norm, name="post_attention_layernorm")(x)
        return x + MLP(self.cfg.intermediate_size, kernels, name="mlp")(h), cache


PLAIN = Kernels(
    linear=linear,
    embedding=embedding,
    norm=rms_norm,
    activation=swiglu,
    attention=reference_attention,
    qkv=project_qkv,
    gate_up=gate_and_up,
    places=causal_places,
    block=DecoderLayer,
    layers=run_layers,
    loss=mean_loss,
)


class Transformer(nn.Module):
    """Embedding, L decoder layers and the final norm: token ids (B, T) to hidden states (B, T, D)."""

    cfg: ModelConfig
    kernels: Kernels

    def setup(self) -> None:
        self.embed_tokens = Embedding(self.cfg.vocab_size, self.cfg.hidden_size, self.kernels)
        self.norm = RMSNorm(self.cfg.rms_norm_eps, self.kernels.norm)

    def __call__(self, input_ids: Array, cache: KVCache | None = None) -> tuple[Array, KVCache | None]:
        x = self.embed_tokens(input_ids)  # (B, T, D)
        places = self.kernels.places(self.cfg, input_ids, cache, upcast(x).dtype)

        def apply_layer(i, weights: Params, x: Array, layer_cache: LayerCache | None):
            layer = self.kernels.block(self.cfg, self.kernels, parent=None, name=f"layers_{i}")
            return layer.apply({"params": weights}, x, places(i), layer_cache)

        x, cache = self.kernels.layers(apply_layer, self.get_variable("params", "layers"), x, cache)
        return self.norm(x), cache


class CausalLM(nn.Module):
    """The transformer and its head: token ids (B, T) to logits (B, T, V) in the weights' dtype.

    With `last` (B,), an index of a position of each text, only the logits there are computed: (B, 1, V).
    """

    cfg: ModelConfig
    kernels: Kernels = PLAIN

    def setup(self) -> None:
        self.model = Transformer(self.cfg, self.kernels)
        if not self.cfg.tie_word_embeddings:
            self.lm_head = Linear(self.cfg.vocab_size, self.kernels.linear)

    def __call__(
        self, input_ids: Array, cache: KVCache | None = None, last: Array | None = None
    ) -> tuple[Array, KVCache | None]:
        x, cache = self.model(input_ids, cache)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)  # (B, 1, D)
        logits = self.model.embed_tokens.attend(x) if self.cfg.tie_word_embeddings else self.lm_head(x)
        return logits, cache

    def init(self, *_: Any, **__: Any) -> Any:
        raise UserError("a CausalLM has no init of its own: make its weights with jax_llm.model.init_params(cfg, seed)")


def init_params(cfg: ModelConfig, seed: int, dtype=jnp.float32) -> Params:
    """Initial weights, bit-identical to torch's from the same seed: uniform, keyed by the canonical name's index."""
    shapes = tensor_shapes(cfg)
    keys = {name: random_bits.fold_in(random_bits.key(seed), i) for i, name in enumerate(shapes)}

    def tensor(name: str) -> Array:
        width = init_range(cfg, name)
        if width is None:
            return jnp.full(shapes[name], init_constant(name), dtype)
        size = shapes[name][0] * shapes[name][1]
        u = random_bits.uniform(random_bits.random_bits(keys[name], size), dtype)
        return ((u - 0.5) * jnp.asarray(width, dtype)).reshape(shapes[name])

    stacks = lambda leaf: jnp.stack([tensor(name) for name in leaf.names]) if leaf.stacked else tensor(*leaf.names)
    return jax.tree.map(stacks, param_leaves(cfg))
