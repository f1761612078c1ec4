"""Generating text: one pass over the prompt fills the cache, then one token at a time.

B batch, P prompt length, V vocab_size. The whole loop is one compiled program: a `while_loop` over a state that holds
the cache, where torch's twin is a Python loop over a cache that it writes to.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_llm import random_bits
from jax_llm.attention import resolve_backend
from jax_llm.checkpoint import from_canonical
from jax_llm.kv_cache import KVCache, init_cache
from jax_llm.model import CausalLM, Params
from jax_llm.sampling import sample
from jax_llm.train import matmul_precision, select_device, x64
from llm_common.config import ModelConfig, SamplingConfig
from llm_common.tensors import check_prompt


def decode_step(
    model: CausalLM, params: Params, cache: KVCache, tokens: Array, key: Array, sampling: SamplingConfig
) -> tuple[KVCache, Array]:
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: the new cache and ids (B,)."""
    logits, cache = model.apply({"params": params}, tokens, cache)  # pyright: ignore[reportAssignmentType]
    rows = jnp.arange(tokens.shape[0])
    positions = jnp.full_like(rows, cache.length)
    return cache, sample(logits[:, -1], sampling, key, rows, positions)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "eos_id"))
def _generate(
    params: Params,
    prompt: Array,
    seed: Array,
    *,
    model: CausalLM,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_id: int | None,
) -> Array:
    key = random_bits.key(seed)
    b, p = prompt.shape
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    cache = init_cache(model.cfg, b, p + max_new_tokens, dtype)
    cache, tokens = decode_step(model, params, cache, prompt, key, sampling)
    texts = jnp.full((b, max_new_tokens), -1, tokens.dtype).at[:, 0].set(tokens)

    def finished(tokens: Array) -> Array:
        return tokens == eos_id if eos_id is not None else jnp.zeros(tokens.shape, bool)

    def unfinished(loop) -> Array:
        i, _, _, _, done = loop
        return (i < max_new_tokens) & ~done.all()

    def body(loop):
        i, cache, tokens, texts, done = loop
        cache, tokens = decode_step(model, params, cache, tokens[:, None], key, sampling)
        texts = texts.at[:, i].set(jnp.where(done, -1, tokens))
        return i + 1, cache, tokens, texts, done | finished(tokens)

    return jax.lax.while_loop(unfinished, body, (1, cache, tokens, texts, finished(tokens)))[3]


def generate(
    model: CausalLM,
    params: Params,
    prompt: np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Continue prompts (B, P) of equal length by up to max_new_tokens each; the new ids of each text, without EOS.

    Raises UserError for an empty prompt, an id outside the vocabulary or a text longer than the model's positions.
    """
    prompt = check_prompt(prompt, model.cfg, max_new_tokens)
    texts = _generate(
        params,
        jnp.array(prompt, jnp.int32),
        jnp.uint32(sampling.seed),
        model=model,
        max_new_tokens=max_new_tokens,
        sampling=dataclasses.replace(sampling, seed=0),  # the seed is a value: no new program for it
        eos_id=eos_id,
    )
    return [[int(i) for i in text if i >= 0 and i != eos_id] for text in np.asarray(texts)]


def generate_from(
    cfg: ModelConfig,
    weights: dict[str, np.ndarray],
    prompt: np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_id: int | None = None,
    device: str = "auto",
    compute_dtype: str = "float32",
) -> list[list[int]]:
    """`generate` from canonical weights on a device by name."""
    target = select_device(device)
    with jax.default_device(target), x64(compute_dtype), matmul_precision(compute_dtype):
        # decoding passes a mask, which cuDNN has nothing to gain from: the backend of a length that it refuses
        model = CausalLM(cfg, backend=resolve_backend("auto", target.platform, compute_dtype, cfg, seq_len=1))
        params = from_canonical(cfg, weights, jnp.dtype(compute_dtype))
        return generate(model, params, prompt, max_new_tokens, sampling, eos_id)
