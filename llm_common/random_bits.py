"""threefry2x32 random bits in NumPy, bit for bit those of `jax.random` with partitionable threefry.

A counter-based generator has no state: bits are a pure function of (key, counter), so JAX, PyTorch and NumPy draw the
same numbers in any order and on any device. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
A key is a uint32 array of shape (..., 2).
"""

import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY_CONSTANT = 0x1BD11BDA


def threefry2x32(key: np.ndarray, x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encrypt the counter words x0, x1 (uint32, any shape that broadcasts against key[..., 0])."""
    k0, k1 = key[..., 0], key[..., 1]
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(PARITY_CONSTANT))
    with np.errstate(over="ignore"):  # uint32 arithmetic is meant to wrap
        x0, x1 = x0 + schedule[0], x1 + schedule[1]
        for i in range(5):
            for rotation in ROTATIONS[i % 2]:
                x0 = x0 + x1
                x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
            x0 = x0 + schedule[(i + 1) % 3]
            x1 = x1 + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x0, x1


def key(seed: int) -> np.ndarray:
    """The key of a seed in [0, 2^32), uint32 of shape (2,)."""
    return np.array([0, seed], np.uint32)


def fold_in(key: np.ndarray, data: int | np.ndarray) -> np.ndarray:
    """A new key from a key and an integer (or an array of them: keys of shape data.shape + (2,))."""
    data = np.asarray(data).astype(np.uint32)
    return np.stack(threefry2x32(key, np.zeros_like(data), data), axis=-1)


def random_bits(key: np.ndarray, n: int) -> np.ndarray:
    """n random uint32 words per key, shape key.shape[:-1] + (n,). n < 2^32."""
    counter = np.arange(n, dtype=np.uint32)
    b0, b1 = threefry2x32(key[..., None, :], np.zeros_like(counter), counter)
    return b0 ^ b1
