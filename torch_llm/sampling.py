"""From logits to a token: temperature, top-k, top-p, min-p, then a Gumbel-max draw with counter-based random bits.

B batch, V vocab_size. A draw depends on (seed, row, position) alone, so a text does not depend on its batch mates.
"""

import torch
from torch import Tensor

from llm_common.config import SamplingConfig
from torch_llm import random_bits
from torch_llm.layers import upcast


def filter_logits(logits: Tensor, cfg: SamplingConfig) -> Tensor:
    """logits (B, V) divided by the temperature, with the tokens that a filter excludes at -inf, in float32.

    top-k keeps exactly k (ties: lowest id). top-p keeps the shortest prefix of the stable descending order whose
    probability, renormalised after top-k, reaches p; the token that crosses p is kept. min-p keeps the tokens with at
    least min_p times the largest probability. Sources: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751 (top-p);
    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082 (min-p).
    """
    logits = upcast(logits) / cfg.temperature
    if cfg.top_k == 0 and cfg.top_p == 1.0 and cfg.min_p == 0.0:
        return logits
    ranked, order = torch.sort(logits, dim=-1, stable=True, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if cfg.top_k > 0:
        keep &= torch.arange(ranked.shape[-1], device=ranked.device) < cfg.top_k
    probs = torch.softmax(torch.where(keep, ranked, -torch.inf), dim=-1)
    if cfg.top_p < 1.0:
        keep &= torch.cumsum(probs, dim=-1) - probs < cfg.top_p  # the mass before this token has not reached p
    if cfg.min_p > 0.0:
        keep &= probs >= cfg.min_p * probs[..., :1]
    keep = torch.zeros_like(keep).scatter(-1, order, keep)  # back to the order of the ids
    return torch.where(keep, logits, -torch.inf)


def gumbel_noise(
    key: Tensor, rows: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """-log(-log u) for each of B (row, position) pairs and each token id: (B, V)."""
    keys = random_bits.fold_in(random_bits.fold_in(key, rows), positions)  # (B, 2)
    return -torch.log(-torch.log(random_bits.uniform(random_bits.random_bits(keys, vocab_size), dtype)))


def sample(logits: Tensor, cfg: SamplingConfig, key: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Token ids (B,) for logits (B, V). Greedy at temperature 0, ties to the lowest id.

    rows (B,): a text's number, which is its row in the batch; positions (B,): the position of the token drawn.
    The argmax of logits + Gumbel noise is a draw from softmax(logits): no cumulative sum, whose rounding would decide.
    """
    if cfg.temperature == 0.0:
        return torch.argmax(upcast(logits), dim=-1)
    filtered = filter_logits(logits, cfg)
    noise = gumbel_noise(key, rows, positions, logits.shape[-1], filtered.dtype)
    return torch.argmax(filtered + noise, dim=-1)
