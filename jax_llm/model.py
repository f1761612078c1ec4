"""The decoder-only language model, and its initial weights.

B batch, T positions, S cache slots, D hidden_size, V vocab_size, L layers.

Layers live in one tree whose arrays are stacked on a leading L axis. They run as a plain loop that applies one layer's
slice after the other, or as one `lax.scan`, which compiles faster and runs slower.

`remat` says what a layer's backward pass computes again instead of keeping it from the forward pass. "none": nothing;
"dots": all but the matrix products; "full": everything but the layer's input.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jax_llm import random_bits
from jax_llm.attention import Attention, Backend, causal_mask
from jax_llm.documents import inside_documents
from jax_llm.kv_cache import KVCache, LayerCache
from jax_llm.layers import MLP, DType, Embedding, Linear, RMSNorm, upcast
from jax_llm.rope import rotary_table
from llm_common.config import ModelConfig, Separator, check_length
from llm_common.tensors import init_constant, init_range, tensor_shapes

Params = Any  # a tree of arrays
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class DecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: ModelConfig
    backend: Backend = "reference"
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        mask: Array | None = None,
        cache: LayerCache | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, LayerCache | None]:
        eps, dtype = self.cfg.rms_norm_eps, self.param_dtype
        h = RMSNorm(eps, dtype, name="input_layernorm")(x)
        h, cache = Attention(self.cfg, self.backend, dtype, name="self_attn")(h, cos, sin, mask, cache, positions)
        x = x + h
        h = RMSNorm(eps, dtype, name="post_attention_layernorm")(x)
        return x + MLP(self.cfg.intermediate_size, dtype, barrier=self.backend == "cudnn", name="mlp")(h), cache


class Transformer(nn.Module):
    """Embedding, L decoder layers and the final norm: token ids (B, T) to hidden states (B, T, D)."""

    cfg: ModelConfig
    backend: Backend = "reference"
    scan_layers: bool = False
    param_dtype: DType = jnp.float32
    remat: str = "none"
    separator: Separator = None

    def setup(self) -> None:
        cfg = self.cfg
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, self.param_dtype)
        self.norm = RMSNorm(cfg.rms_norm_eps, self.param_dtype)
        if self.is_initializing():
            self.layers = self.param("layers", self._init_layers)
        else:  # stacked on L, or already sliced into a tuple of L trees, as `train_step` does
            self.layers = self.get_variable("params", "layers")

    def _init_layers(self, key: Array) -> Params:
        layer = DecoderLayer(self.cfg, self.backend, self.param_dtype, parent=None)
        x, (cos, sin) = jnp.zeros((1, 1, self.cfg.hidden_size)), rotary_table(self.cfg, 1, jnp.float32)
        keys = jax.random.split(key, self.cfg.num_hidden_layers)
        return jax.vmap(lambda key: layer.init(key, x, cos, sin)["params"])(keys)

    def __call__(self, input_ids: Array, cache: KVCache | None = None) -> tuple[Array, KVCache | None]:
        x = self.embed_tokens(input_ids)  # (B, T, D)
        t, table_dtype = input_ids.shape[1], upcast(x).dtype
        if cache is None:
            check_length(self.cfg, t, "the input")
            cos, sin = rotary_table(self.cfg, t, table_dtype)
            positions, mask, caches = None, None, (None,) * self.cfg.num_hidden_layers
            if self.separator is not None:
                place, mask = inside_documents(input_ids, self.separator, self.cfg.sliding_window)
                cos, sin = cos[place], sin[place]
        else:
            slots, caches = cache.layers[0].k.shape[1], cache.layers
            positions = cache.length[:, None] + jnp.arange(t)  # (B, T)
            cos, sin = (table[positions] for table in rotary_table(self.cfg, slots, table_dtype))
            mask = causal_mask(positions, jnp.arange(slots), self.cfg.sliding_window)[:, None]  # (B, 1, T, S)

        def apply_layer(i, params: Params, x: Array, layer_cache: LayerCache | None):
            layer = DecoderLayer(self.cfg, self.backend, self.param_dtype, parent=None, name=f"layers_{i}")
            return layer.apply({"params": params}, x, cos, sin, mask, layer_cache, positions)

        if self.remat != "none" and cache is None:
            apply_layer = jax.checkpoint(apply_layer, policy=REMAT_POLICIES[self.remat], static_argnums=0)

        if self.scan_layers and cache is None:
            x, _ = jax.lax.scan(lambda x, params: (apply_layer("all", params, x, None)[0], None), x, self.layers)
        else:
            new_caches = []
            for i, params in enumerate(slice_layers(self.layers, self.cfg.num_hidden_layers)):
                x, layer_cache = apply_layer(i, params, x, caches[i])
                new_caches.append(layer_cache)
            if cache is not None:
                cache = KVCache(tuple(new_caches), cache.length + t)
        return self.norm(x), cache


class CausalLM(nn.Module):
    """The transformer and its head: token ids (B, T) to logits (B, T, V) in the weights' dtype.

    With `last` (B,), an index of a position of each text, only the logits there are computed: (B, 1, V).
    """

    cfg: ModelConfig
    backend: Backend = "reference"
    scan_layers: bool = False
    param_dtype: DType = jnp.float32
    remat: str = "none"
    separator: Separator = None  # the id that ends a document, if none may see another

    def setup(self) -> None:
        self.model = Transformer(self.cfg, self.backend, self.scan_layers, self.param_dtype, self.remat, self.separator)
        if not self.cfg.tie_word_embeddings:
            self.lm_head = Linear(self.cfg.vocab_size, self.param_dtype)

    def __call__(
        self, input_ids: Array, cache: KVCache | None = None, last: Array | None = None
    ) -> tuple[Array, KVCache | None]:
        x, cache = self.model(input_ids, cache)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)  # (B, 1, D)
        logits = self.model.embed_tokens.attend(x) if self.cfg.tie_word_embeddings else self.lm_head(x)
        return logits, cache


def slice_layers(layers: Params, num_layers: int) -> tuple[Params, ...]:
    """The trees of the single layers, from a tree stacked on L (or from what is such a tuple already)."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(num_layers))


def stack_layers(layers: tuple[Params, ...]) -> Params:
    """The inverse of `slice_layers`."""
    return jax.tree.map(lambda *w: jnp.stack(w), *layers)


def build_params(cfg: ModelConfig, tensor: Callable[[str], Any], stack: Callable = jnp.stack) -> Params:
    """The parameter tree whose leaves are `tensor(canonical name)`; those of the layers are put together by `stack`."""
    tree: dict[str, Any] = {}
    for name in tensor_shapes(cfg):
        if name.startswith("model.layers."):
            if not name.startswith("model.layers.0."):
                continue
            suffix = name.removeprefix("model.layers.0.")
            leaf = stack([tensor(f"model.layers.{i}.{suffix}") for i in range(cfg.num_hidden_layers)])
            name = f"model.layers.{suffix}"
        else:
            leaf = tensor(name)
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

    return build_params(cfg, tensor)
