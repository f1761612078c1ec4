"""Generating text: one pass over the prompt fills the cache, then one token at a time.

B batch, P prompt length, V vocab_size. A Python loop over a cache that it writes to, where JAX's twin is one compiled
`while_loop` over a state that holds the cache.
"""

import numpy as np
import torch
from torch import Tensor

from llm_common.config import ModelConfig, SamplingConfig
from llm_common.tensors import check_prompt
from torch_llm import random_bits
from torch_llm.attention import resolve_backend
from torch_llm.checkpoint import from_canonical
from torch_llm.kv_cache import KVCache
from torch_llm.model import CausalLM, empty_model
from torch_llm.sampling import sample
from torch_llm.train import matmul_precision, select_device


def decode_step(model: CausalLM, cache: KVCache, tokens: Tensor, key: Tensor, sampling: SamplingConfig) -> Tensor:
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: ids (B,)."""
    logits = model(tokens, cache)
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    positions = torch.full_like(rows, cache.length)
    return sample(logits[:, -1], sampling, key, rows, positions)


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt: np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Continue prompts (B, P) of equal length by up to max_new_tokens each; the new ids of each text, without EOS.

    Raises UserError for an empty prompt, an id outside the vocabulary or a text longer than the model's positions.
    """
    prompt = check_prompt(prompt, model.cfg, max_new_tokens)
    weight = model.model.embed_tokens.weight
    b, p = prompt.shape
    cache = KVCache(model.cfg, b, p + max_new_tokens, weight.dtype, weight.device)
    key = random_bits.key(sampling.seed, weight.device)
    tokens = torch.tensor(prompt, device=weight.device).long()
    texts: list[list[int]] = [[] for _ in range(b)]
    done = [False] * b
    for _ in range(max_new_tokens):
        drawn = decode_step(model, cache, tokens, key, sampling)
        for row, token in enumerate(drawn.tolist()):
            done[row] = done[row] or token == eos_id
            if not done[row]:
                texts[row].append(token)
        if all(done):
            break
        tokens = drawn[:, None]
    return texts


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
    backend = resolve_backend("auto", target.type, compute_dtype)
    model = from_canonical(empty_model(cfg, backend, getattr(torch, compute_dtype), target), weights)
    with matmul_precision(compute_dtype):
        return generate(model, prompt, max_new_tokens, sampling, eos_id)
