"""threefry2x32 random bits, bit for bit JAX's, in int64 arithmetic on any device (torch has few uint32 operations).

A key is an int64 tensor (..., 2) of words below 2^32. Source: Salmon et al. 2011, "Parallel random numbers".
"""

import torch
from torch import Tensor

from llm_common.random_bits import PARITY_CONSTANT, ROTATIONS

MASK = 0xFFFFFFFF


def threefry2x32(key: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt the counter words x0, x1; they broadcast against key[..., 0]."""
    k0, k1 = key[..., 0], key[..., 1]
    schedule = (k0, k1, k0 ^ k1 ^ PARITY_CONSTANT)
    x0, x1 = (x0 + schedule[0]) & MASK, (x1 + schedule[1]) & MASK
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            x0 = (x0 + x1) & MASK
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & MASK) ^ x0
        x0 = (x0 + schedule[(i + 1) % 3]) & MASK
        x1 = (x1 + schedule[(i + 2) % 3] + i + 1) & MASK
    return x0, x1


def key(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of a seed in [0, 2^32)."""
    return torch.tensor([0, seed], dtype=torch.int64, device=device)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and an integer (or an integer tensor: one key for each)."""
    data = torch.as_tensor(data, dtype=torch.int64, device=key.device)
    return torch.stack(threefry2x32(key, torch.zeros_like(data), data), dim=-1)


def random_bits(key: Tensor, n: int) -> Tensor:
    """n random words per key, int64 of shape key.shape[:-1] + (n,)."""
    return random_bits_at(key[..., None, :], torch.arange(n, dtype=torch.int64, device=key.device))


def random_bits_at(key: Tensor, counter: Tensor) -> Tensor:
    """The random words that have these numbers, int64; `counter` broadcasts against key[..., 0]."""
    b0, b1 = threefry2x32(key, torch.zeros_like(counter), counter)
    return b0 ^ b1


def uniform(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in (0, 1) from the upper 23 bits, at the middle of each cell: never 0 and exact in float32."""
    return ((bits >> 9).to(dtype) + 0.5) * 2.0**-23
