"""threefry in NumPy, torch, JAX and the specification: the same bits."""

import jax
import numpy as np
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
    uniform = llm_common.random_bits.uniform(bits[0].astype(np.uint32))
    np.testing.assert_array_equal(spec.uniform(spec.fold_in((0, seed), data), n), uniform)


def test_uniform_numbers_are_never_zero_or_one():
    ends = np.array([0, 2**32 - 1], np.uint32)
    for dtype in (np.float32, np.float64):
        u = llm_common.random_bits.uniform(ends, dtype)
        assert 0 < u[0] < u[1] < 1


def test_known_answers():
    """From the reference implementation of Salmon et al. (Random123), threefry2x32 with 20 rounds."""
    zero, ones = np.uint32(0), np.uint32(0xFFFFFFFF)
    words = [int(x) for x in llm_common.random_bits.threefry2x32(np.array([zero, zero]), zero, zero)]
    assert words == [0x6B200159, 0x99BA4EFE]
    words = [int(x) for x in llm_common.random_bits.threefry2x32(np.array([ones, ones]), ones, ones)]
    assert words == [0x1CB996FC, 0xBB002BE7]
