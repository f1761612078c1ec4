"""One step of decoding: tokens into the cache, logits out of it, the next token drawn.

    here                                   torch_llm.engine.decoding
    prefill, decode: compiled functions    steps that write into a cache; on a GPU
    of a cache, which they return          captured and played again

B batch, P longest prompt, V vocab_size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jax_llm import random_bits
from jax_llm.kv_cache import KVCache, init_cache
from jax_llm.model import CausalLM
from jax_llm.params import Params, unstack
from jax_llm.sampling import sample
from llm_common.config import SamplingConfig
from llm_common.tensors import FUSED


def fuse_projections(layer: Params) -> Params:
    """A layer's tree with the weights that multiply the same input put side by side, so that one product replaces them.

    For decoding, whose products are too small to fill a GPU. Training gains nothing by it.
    """
    layer = {**layer}
    for block, (fused, *names) in FUSED.items():
        rest = {name: p for name, p in layer[block].items() if name not in names}
        parts = [layer[block][name] for name in names]
        layer[block] = {**rest, fused: jax.tree.map(lambda *w: jnp.concatenate(w), *parts)}
    return layer


def decoding_params(params: Params) -> Params:
    """The tree that decoding runs with: layers as a tuple of L trees, their projections fused."""
    params = unstack(params)
    model = params["model"]
    return {**params, "model": {**model, "layers": tuple(map(fuse_projections, model["layers"]))}}


def decode_step(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    tokens: Array,
    key: Array,
    numbers: Array,
    sampling: SamplingConfig,
    lengths: Array | None = None,
) -> tuple[KVCache, Array]:
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: the new cache and ids (B,), -1
    where the logits are not finite.

    lengths (B,): how many of the T tokens are each text's own, if they are padded.
    """
    t = tokens.shape[1]
    last = jnp.full(tokens.shape[0], t - 1) if lengths is None else lengths - 1
    logits: Array
    logits, new_cache = model.apply({"params": params}, jnp.maximum(tokens, 0), cache, last)  # pyright: ignore
    new_cache = KVCache(new_cache.layers, cache.length + last + 1)  # pyright: ignore[reportAttributeAccessIssue]
    drawn = sample(logits[:, 0], sampling, key, numbers, new_cache.length)
    return new_cache, jnp.where(jnp.isfinite(logits[:, 0].max(-1)), drawn, -1)


@partial(jax.jit, static_argnames=("model", "sampling", "slots"))
def prefill(
    params: Params,
    prompts: Array,
    lengths: Array,
    numbers: Array,
    seed: Array,
    *,
    model: CausalLM,
    sampling: SamplingConfig,
    slots: int,
) -> tuple[KVCache, Array]:
    """A cache of `slots` positions with the prompts (B, P) in it, and the first token of each text (B,)."""
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    cache = init_cache(model.cfg, prompts.shape[0], slots, dtype)
    return decode_step(model, params, cache, prompts, random_bits.key(seed), numbers, sampling, lengths)


@partial(jax.jit, static_argnames=("model", "sampling", "n"), donate_argnames="cache")
def decode(
    params: Params,
    cache: KVCache,
    tokens: Array,
    numbers: Array,
    seed: Array,
    *,
    n: int,
    model: CausalLM,
    sampling: SamplingConfig,
) -> tuple[KVCache, Array, Array]:
    """Feed tokens (B,) and draw n more of each text: the new cache, the last ids (B,) and all n (B, n).

    Tokens drawn after the cache is full are meaningless; the caller must drop them.
    """
    key = random_bits.key(seed)

    def body(i: int, loop):
        cache, tokens, texts = loop
        cache, tokens = decode_step(model, params, cache, tokens[:, None], key, numbers, sampling)
        return cache, tokens, texts.at[:, i].set(tokens)

    texts = jnp.zeros((tokens.shape[0], n), tokens.dtype)
    return jax.lax.fori_loop(0, n, body, (cache, tokens, texts))
