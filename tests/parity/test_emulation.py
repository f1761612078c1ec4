"""A TPU's matrix products emulated on a CPU: exactly the rounding that is said, and a check that notices if there is
none.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from parity.checks.devices import check_device
from parity.core import emulation
from parity.core.emulation import with_bfloat16_operands
from parity.sides.settings import Settings

RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal((7, 5)).astype(np.float32), RNG.standard_normal((5, 3)).astype(np.float32))


def bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_the_factors_are_rounded_and_nothing_else():
    f = lambda a, b: {"product": jax.jit(lambda a, b: a @ b)(a, b) + 1e-4, "sum": a + 1e-4}
    out = with_bfloat16_operands(f)(jnp.array(A), jnp.array(B))
    np.testing.assert_allclose(out["product"], bfloat16(A) @ bfloat16(B) + np.float32(1e-4), rtol=1e-6)
    np.testing.assert_array_equal(out["sum"], A + np.float32(1e-4))
    assert np.abs(np.asarray(out["product"]) - (A @ B + 1e-4)).max() > 1e-3


def test_the_products_of_the_backward_pass_are_rounded_too():
    grad = with_bfloat16_operands(jax.grad(lambda a, b: ((a @ b) ** 2).sum()))(jnp.array(A), jnp.array(B))
    forward = bfloat16(A) @ bfloat16(B)
    np.testing.assert_allclose(grad, bfloat16(2 * forward) @ bfloat16(B).T, rtol=1e-5, atol=1e-5)


def test_the_check_holds_and_an_emulation_that_rounds_nothing_fails_it(monkeypatch):
    settings = Settings(dtypes=("float32",))
    rows = list(check_device(settings))
    assert [row.ok for row in rows] == [True, True]
    monkeypatch.setattr(emulation, "_round", lambda x: x)
    assert [row.ok for row in check_device(settings)] == [False, False]
