"""Generating text: one pass over the prompts fills the cache, then one token at a time.

    here                                       torch_llm.generate
    prefill, decode: compiled functions of     the same steps written into a cache
    a cache, which they return                 that they change
    generate_stream(model, params, ...)        generate_stream(model, ...)

B batch, P longest prompt, V vocab_size. Prompts may have different lengths: they are padded on the right. A text is decided by
its prompt, its number in `numbers` and the seed, never by the texts beside it.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_llm import random_bits
from jax_llm.checkpoint import from_canonical, to_host
from jax_llm.fast.attention import resolve_backend
from jax_llm.fast.kernels import make_kernels
from jax_llm.kv_cache import KVCache, init_cache
from jax_llm.model import CausalLM
from jax_llm.params import Params, unstack
from jax_llm.sampling import sample
from jax_llm.train import matmul_precision, select_device, watch_outputs, x64
from llm_common.config import ModelConfig, SamplingConfig
from llm_common.errors import UserError
from llm_common.tensors import FUSED, Tensors, bucket, check_prompts

CHUNK = 16  # tokens drawn by one call of the compiled loop, after which the host looks at the texts


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
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: the new cache and ids (B,), -1 where
    the logits are not finite.

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

    What does not fit into the cache is drawn from nonsense: it is for the caller to leave it away.
    """
    key = random_bits.key(seed)

    def body(i: int, loop):
        cache, tokens, texts = loop
        cache, tokens = decode_step(model, params, cache, tokens[:, None], key, numbers, sampling)
        return cache, tokens, texts.at[:, i].set(tokens)

    texts = jnp.zeros((tokens.shape[0], n), tokens.dtype)
    return jax.lax.fori_loop(0, n, body, (cache, tokens, texts))


def generate_stream(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
    chunk: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """Continue prompts by up to max_new_tokens each; yields the new ids of every text, some at a time.

    A text ends before an id in eos_ids, or once `finished(row, its ids)` says so. numbers: the number of each text, folded
    into its random bits; default: its row. chunk: ids between two looks of the host. An accelerator is given the next chunk
    before the host looks at the last one.
    Raises UserError for an empty prompt, an id outside the vocabulary or a text longer than the model's positions.
    """
    padded, lengths = check_prompts(prompts, model.cfg, max_new_tokens)
    b, limit = len(padded), model.cfg.max_position_embeddings
    slots = bucket(padded.shape[1] + max_new_tokens, limit)
    padded = np.pad(padded, ((0, 0), (0, bucket(padded.shape[1], limit) - padded.shape[1])))
    row_numbers = np.arange(b, dtype=np.int32) if numbers is None else np.array(numbers, np.int32)
    seed, sampling = np.uint32(sampling.seed), dataclasses.replace(sampling, seed=0)  # a value, not a program
    settings = {"model": model, "sampling": sampling}
    ahead = 0 if next(iter(params["model"]["norm"]["weight"].devices())).platform == "cpu" else 1
    cache, tokens = prefill(params, padded, lengths, row_numbers, seed, slots=slots, **settings)
    begun, total, pieces = 1, 0, deque([tokens[:, None]])
    texts: list[list[int]] = [[] for _ in range(b)]
    done = [False] * b
    while True:
        while len(pieces) <= ahead and begun < max_new_tokens:
            cache, tokens, piece = decode(params, cache, tokens, row_numbers, seed, n=chunk, **settings)
            pieces.append(piece)
            begun += chunk
        drawn = to_host(pieces.popleft())[:, : max_new_tokens - total]
        total += drawn.shape[1]
        new: list[list[int]] = [[] for _ in range(b)]
        for row, ids in enumerate(drawn.tolist()):
            for token in ids:
                if token < 0 and not done[row]:
                    raise UserError(why_not_finite(model, params, [*padded[row, : lengths[row]], *texts[row]]))
                done[row] = done[row] or token in eos_ids
                if not done[row]:
                    new[row].append(token)
                    texts[row].append(token)
                    done[row] = finished is not None and finished(row, texts[row])
        yield new
        if all(done) or total == max_new_tokens:
            return


def why_not_finite(model: CausalLM, params: Params, ids: Sequence[int]) -> str:
    """Which module's output is the first that is not finite for the ids of a text; for people."""
    _, found = watch_outputs(model, params, jnp.array([[int(i) for i in ids]]))
    return f"the logits after {len(ids)} tokens are not finite: {found or 'only with a cache'}; try another --compute-dtype"


def generate(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """The whole of `generate_stream`: the new ids of each text, without the id that ended it."""
    texts: list[list[int]] = [[] for _ in prompts]
    for new in generate_stream(model, params, prompts, max_new_tokens, sampling, eos_ids, numbers, finished):
        for text, ids in zip(texts, new, strict=True):
            text += ids
    return texts


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, device: str = "auto", compute_dtype: str = "float32"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """Inside `with`: `generate_stream` of canonical weights on a device by name, its first two arguments filled in."""
    target = select_device(device)
    with jax.default_device(target), x64(compute_dtype), matmul_precision(compute_dtype):
        backend = resolve_backend("auto", target.platform, compute_dtype, cfg, seq_len=0)
        model = CausalLM(cfg, make_kernels(backend, fused_projections=True))
        params = decoding_params(from_canonical(cfg, weights, jnp.dtype(compute_dtype)))
        yield partial(generate_stream, model, params)
