"""threefry in NumPy, torch, JAX and the specification: the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_llm.random_bits
import llm_common.random_bits
import torch_llm.random_bits
from parity import spec

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, data=seeds, n=st.integers(1, 50))
def test_all_four_draw_the_same_bits(seed, data, n):
    bits = []
    for side in (llm_common.random_bits, torch_llm.random_bits, jax_llm.random_bits):
        bits.append(np.asarray(side.random_bits(side.fold_in(side.key(seed), data), n)).astype(np.int64))
    bits.append(
        np.asarray(jax.random.bits(jax.random.fold_in(jax.random.key(seed), np.uint32(data)), (n,))).astype(np.int64)
    )
    for other in bits[1:]:
        np.testing.assert_array_equal(bits[0], other)
    key = torch_llm.random_bits.fold_in(torch_llm.random_bits.key(seed), data)
    uniform = torch_llm.random_bits.uniform(torch_llm.random_bits.random_bits(key, n), torch.float64)
    np.testing.assert_array_equal(spec.uniform(spec.fold_in((0, seed), data), n), uniform)


def test_uniform_numbers_are_never_zero_or_one():
    with jax.enable_x64(True):
        for dtype in ("float32", "float64"):
            of_jax = jax_llm.random_bits.uniform(jnp.array([0, 2**32 - 1], jnp.uint32), jnp.dtype(dtype))
            of_torch = torch_llm.random_bits.uniform(torch.tensor([0, 2**32 - 1]), getattr(torch, dtype))
            for low, high in (map(float, of_jax), map(float, of_torch)):
                assert 0 < low < high < 1


def test_known_answers():
    """From the reference implementation of Salmon et al. (Random123), threefry2x32 with 20 rounds."""
    zero, ones = np.uint32(0), np.uint32(0xFFFFFFFF)
    words = [int(x) for x in llm_common.random_bits.threefry2x32(np.array([zero, zero]), zero, zero)]
    assert words == [0x6B200159, 0x99BA4EFE]
    words = [int(x) for x in llm_common.random_bits.threefry2x32(np.array([ones, ones]), ones, ones)]
    assert words == [0x1CB996FC, 0xBB002BE7]
