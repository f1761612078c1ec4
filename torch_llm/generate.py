"""Generating text: one pass over the prompts fills the cache, then one token at a time.

    here                                       jax_llm.generate
    steps written into a cache that            prefill, decode: compiled functions of
    they change                                a cache, which they return
    generate_stream(model, ...)                generate_stream(model, params, ...)

B batch, P longest prompt, V vocab_size. Prompts may have different lengths: they are padded on the right. A text is decided by
its prompt, its number in `numbers` and the seed, never by the texts beside it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llm_common.config import ModelConfig, SamplingConfig
from llm_common.tensors import Tensors, check_prompts
from torch_llm import random_bits
from torch_llm.attention import resolve_backend
from torch_llm.checkpoint import from_canonical
from torch_llm.kv_cache import KVCache
from torch_llm.model import CausalLM, empty_model
from torch_llm.sampling import sample
from torch_llm.train import matmul_precision, select_device

CHUNK = 16  # tokens drawn between two looks of the host at the texts


@torch.no_grad()
def decode_step(
    model: CausalLM,
    cache: KVCache,
    tokens: Tensor,
    key: Tensor,
    numbers: Tensor,
    sampling: SamplingConfig,
    lengths: Tensor | None = None,
) -> Tensor:
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: ids (B,).

    lengths (B,): how many of the T tokens are each text's own, if they are padded.
    """
    start, t = cache.length, tokens.shape[1]
    last = torch.full_like(start, t - 1) if lengths is None else lengths - 1
    logits = model(tokens, cache, last)
    cache.set_length(start + last + 1)
    return sample(logits[:, 0], sampling, key, numbers, cache.length)


def generate_stream(
    model: CausalLM,
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
    into its random bits; default: its row. chunk: ids between two looks of the host, at most CHUNK.
    Raises UserError for an empty prompt, an id outside the vocabulary or a text longer than the model's positions.
    """
    padded, lengths = check_prompts(prompts, model.cfg, max_new_tokens)
    b, weight = len(padded), model.model.embed_tokens.weight
    device = weight.device
    row_numbers = torch.arange(b, device=device) if numbers is None else torch.tensor(numbers, device=device)
    cache = KVCache(model.cfg, b, padded.shape[1] + max_new_tokens, weight.dtype, device)
    key = random_bits.key(sampling.seed, device)
    tokens = torch.tensor(padded, device=device).long()
    tokens = decode_step(model, cache, tokens, key, row_numbers, sampling, torch.tensor(lengths, device=device).long())
    drawn, total = tokens[:, None], 1
    texts: list[list[int]] = [[] for _ in range(b)]
    done = [False] * b
    while True:
        new: list[list[int]] = [[] for _ in range(b)]
        for row, ids in enumerate(drawn.tolist()):
            for token in ids:
                done[row] = done[row] or token in eos_ids
                if not done[row]:
                    new[row].append(token)
                    texts[row].append(token)
                    done[row] = finished is not None and finished(row, texts[row])
        yield new
        if all(done) or total == max_new_tokens:
            return
        columns = []
        for _ in range(min(chunk, CHUNK, max_new_tokens - total)):
            tokens = decode_step(model, cache, tokens[:, None], key, row_numbers, sampling)
            columns.append(tokens)
        drawn, total = torch.stack(columns, dim=1), total + len(columns)


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """The whole of `generate_stream`: the new ids of each text, without the id that ended it."""
    texts: list[list[int]] = [[] for _ in prompts]
    for new in generate_stream(model, prompts, max_new_tokens, sampling, eos_ids, numbers, finished):
        for text, ids in zip(texts, new, strict=True):
            text += ids
    return texts


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, device: str = "auto", compute_dtype: str = "float32"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """Inside `with`: `generate_stream` of canonical weights on a device by name, its first argument filled in."""
    target = select_device(device)
    backend = resolve_backend("auto", target.type, compute_dtype)
    model = from_canonical(empty_model(cfg, backend, getattr(torch, compute_dtype), target), weights)
    with matmul_precision(compute_dtype):
        yield partial(generate_stream, model)
