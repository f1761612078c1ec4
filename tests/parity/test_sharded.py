"""Training on many devices: the meshes, the planted bugs, and runs that change their mesh, on processes of this
machine.
"""

import numpy as np
import pytest

from parity.sharded.sharded import GROUPS, QUICK, SHARDING_BUGS, drawn_groups, plant, run_group

QUICK_BUGS = {
    "norm of a process's own gradients": "grad_norm",
    "mean of every process's own mean": "differs first at loss_and_grads, gradient",
    "the same data on all devices": "differs first at read_batch, inputs",
}


@pytest.mark.parametrize("group", QUICK, ids=str)
def test_a_mesh_gives_what_the_specification_gives(group):
    rows = run_group(group)
    assert len(rows) >= 8 * len(group.cases)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("bug", [b for b in SHARDING_BUGS if b.name in QUICK_BUGS], ids=lambda bug: bug.name)
def test_a_planted_sharding_bug_goes_red_at_its_place(bug):
    caught, red = plant(bug)
    assert caught, red
    assert QUICK_BUGS[bug.name] in red, red


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_mesh(group):
    assert [row for row in run_group(group) if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("group", tuple(drawn_groups(1)), ids=str)
def test_a_drawn_mesh(group):
    assert [row for row in run_group(group) if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("bug", [b for b in SHARDING_BUGS if b.name not in QUICK_BUGS], ids=lambda bug: bug.name)
def test_every_planted_sharding_bug(bug):
    caught, red = plant(bug)
    assert caught, red


@pytest.mark.parametrize("window", [None, 100])
def test_the_tpu_kernel_equals_the_reference_in_value_and_gradient(window):
    """In interpret mode, float32: both sum over 256 keys in float32 in other orders. Bound: 16 times the rounding of
    256 terms, 16 sqrt(256) 2^-24 = 1.5e-5; the largest figure seen is 5.7e-7, of dk.
    """
    import jax
    import jax.numpy as jnp

    from jax_llm.attention import reference_attention
    from jax_llm.fast.attention import splash_attention

    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.array(rng.standard_normal((2, 256, heads, 64)), jnp.float32)
    q, k, v, weight = draw(4), draw(2), draw(2), draw(4)
    both = []
    for attention in (
        lambda q, k, v: splash_attention(q, k, v, window, interpret=True),
        lambda q, k, v: reference_attention(q, k, v, None, window),
    ):
        with jax.default_matmul_precision("highest"):
            out, pull_back = jax.vjp(attention, q, k, v)
            both.append([np.asarray(x) for x in (out, *pull_back(weight))])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *both, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 16 * 256**0.5 * 2.0**-24, (name, error)
    wrong = np.asarray(reference_attention(q, k, v, None, 64))  # another window would be seen
    assert np.linalg.norm(both[0][0] - wrong) > 0.1 * np.linalg.norm(wrong)
