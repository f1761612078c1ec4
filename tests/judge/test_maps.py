"""Maps: they go both ways, and gradients go through them as the chain rule has it."""

import numpy as np
import pytest

from parity.judge.maps import Map, Part, whole
from parity.judge.matching import match

RNG = np.random.default_rng(0)
LEAVES = {"a": RNG.standard_normal((4, 6)), "b": RNG.standard_normal((2, 6)), "s": RNG.standard_normal((3, 4, 6))}
MAPS = {
    "transposed": whole("a", ("transpose", (1, 0))),
    "flipped": whole("a", ("flip", (1,))),
    "joined": Map((Part("a"), Part("b")), 0),
    "of a stack": Map((Part("s").sliced(0, 1, 2).then(("reshape", (4, 6)), ("transpose", (1, 0))),)),
    "shifted": Map((Part("a"),), scale=2.0, shift=1.0),
    "heads": whole("s", ("transpose", (1, 2, 0)), ("reshape", (24, 3))),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_can_be_turned_round(name):
    made = MAPS[name]
    there = {key: np.zeros_like(x) for key, x in LEAVES.items()}
    made.put(there, made(LEAVES))
    np.testing.assert_allclose(made(there), made(LEAVES), rtol=1e-14)
    for part in made.parts:
        np.testing.assert_allclose(part(there), part(LEAVES), rtol=1e-13)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_follow_the_chain_rule(name):
    """f(candidate's tensor) = <c, tensor>: the gradient is c, and the reference's is the map's adjoint of c."""
    made = MAPS[name]
    c = RNG.standard_normal(made(LEAVES).shape)
    grads = {}
    for key, x in LEAVES.items():
        grads[key] = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            moved = {**LEAVES, key: x.copy()}
            moved[key][at] += 1.0
            grads[key][at] = np.sum(c * (made(moved) - made(LEAVES)))  # linear: exact but for rounding
    np.testing.assert_allclose(made.gradient(grads), c, rtol=1e-9, atol=1e-12)


def test_two_biases_that_are_added_are_one():
    first, second = Map((Part("b"),)), Map((Part("b", beside=True),))
    assert not second(LEAVES).any()
    np.testing.assert_array_equal(second.gradient(LEAVES), LEAVES["b"])
    there = {"b": np.zeros((2, 6))}
    first.put(there, np.ones((2, 6)))
    second.put(there, np.full((2, 6), 3.0))
    assert (there["b"] == 4.0).all()


def test_stacks_of_stacks_and_joined_projections_are_found():
    rng = np.random.default_rng(1)
    reference = {
        "stages.blocks.attn.query.kernel": rng.standard_normal((2, 3, 8, 2, 4)),
        "stages.blocks.attn.key.kernel": rng.standard_normal((2, 3, 8, 2, 4)),
        "stages.blocks.attn.value.kernel": rng.standard_normal((2, 3, 8, 2, 4)),
        "stages.blocks.norm.scale": rng.standard_normal((2, 3, 8)),
    }
    candidate = {}
    for i in range(2):
        for j in range(3):
            candidate[f"stages.{i}.blocks.{j}.attn.qkv.weight"] = np.zeros((24, 8))
            candidate[f"stages.{i}.blocks.{j}.norm.weight"] = np.zeros(8)
    found = match(candidate, reference)
    assert found.complete, (found.missing, found.unused)
    got = found.maps["stages.1.blocks.2.attn.qkv.weight"](reference)
    wanted = [reference[f"stages.blocks.attn.{x}.kernel"][1, 2].reshape(8, 8).T for x in ("query", "key", "value")]
    np.testing.assert_array_equal(got, np.concatenate(wanted))


def test_three_hundred_tensors_are_matched_in_seconds():
    import time

    shapes = {"attn.q.weight": (8, 8), "attn.k.weight": (8, 8), "mlp.up.weight": (16, 8), "norm.weight": (8,)}
    candidate = {f"layers.{i}.{n}": np.zeros(s) for i in range(75) for n, s in shapes.items()}
    reference = {
        f"h_{i}.{n.replace('weight', 'kernel')}": np.zeros(s[::-1]) for i in range(75) for n, s in shapes.items()
    }
    start = time.process_time()
    found = match(candidate, reference)
    assert found.complete
    assert all(f"h_{name.split('.')[1]}." in str(made) for name, made in found.maps.items())
    assert time.process_time() - start < 120  # it was 71 s for 192; no bound on speed, but on its growth
