"""A pair that is not ours: matching, agreement, and that what differs is seen and placed."""

import runpy
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from llm_common.errors import UserError
from parity.core.compare import JAX, TORCH
from parity.pair import assert_same
from parity.pair.matching import leaves_of, match
from parity.pair.pair import EITHER, Pair, compare_optimizers

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).standard_normal((5, 12))


class Flax(linen.Module):
    eps: float = 1e-5

    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(16)(x), approximate=False)
        return linen.Dense(16)(linen.LayerNorm(epsilon=self.eps)(x))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_0, self.layer_norm_0 = torch.nn.Linear(12, 16), torch.nn.LayerNorm(16)
        self.dense_1 = torch.nn.Linear(16, 16)  # square: only the name of the leaf tells that it is transposed

    def forward(self, x):
        return self.dense_1(self.layer_norm_0(torch.nn.functional.gelu(self.dense_0(x))))


def params_of(module=None):
    return (module or Flax()).init(jax.random.key(0), X.astype(np.float32))


def test_a_port_agrees_in_five_lines():
    comparison = assert_same(Flax(), Torch(), inputs=[X], params=params_of())
    assert comparison.matching.how["dense_1.weight"] == "params.Dense_1.kernel, transposed (by shape and name)"
    assert {row.check for row in comparison.rows} == {"weights", "outputs", "gradients"}


def test_another_eps_is_seen_and_placed():
    with pytest.raises(AssertionError, match=r"differ first at layer_norm_0 \(LayerNorm_0 in JAX\).*identical inputs"):
        assert_same(Flax(eps=1e-4), Torch(), inputs=[X], params=params_of())


def test_a_gradient_that_is_lost_is_seen_though_the_outputs_agree():
    class Detached(Torch):
        def forward(self, x):
            return self.dense_1(self.layer_norm_0(torch.nn.functional.gelu(self.dense_0(x)).detach()))

    pair = Pair(Flax(), Detached(), inputs=[X], params=params_of())
    comparison = pair.compare()
    assert [row.check for row in comparison.rows if not row.ok] == ["gradients", "gradients"]
    assert comparison.gradients["dense_0.weight"] > 0.9
    assert comparison.gradients["dense_1.weight"] < 1e-14


def test_weights_already_shared_are_matched_by_value_with_transposes():
    module, params = Torch(), params_of()
    shuffled = {
        "a": params["params"]["Dense_1"],
        "b": params["params"]["Dense_0"],
        "c": params["params"]["LayerNorm_0"],
    }
    rng = np.random.default_rng(1)
    shuffled = jax.tree.map(lambda x: jnp.array(rng.standard_normal(x.shape), jnp.float32), shuffled)
    with torch.no_grad():
        for p, leaf in (
            (module.dense_0.weight, shuffled["b"]["kernel"].T),
            (module.dense_0.bias, shuffled["b"]["bias"]),
            (module.dense_1.weight, shuffled["a"]["kernel"].T),
            (module.dense_1.bias, shuffled["a"]["bias"]),
            (module.layer_norm_0.weight, shuffled["c"]["scale"]),
            (module.layer_norm_0.bias, shuffled["c"]["bias"]),
        ):
            p.copy_(torch.tensor(np.array(leaf)))

    def function(p, x):
        x = jax.nn.gelu(x @ p["b"]["kernel"] + p["b"]["bias"], approximate=False)
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return (x * p["c"]["scale"] + p["c"]["bias"]) @ p["a"]["kernel"] + p["a"]["bias"]

    pair = Pair(function, module, inputs=[X], params=shuffled, weights="shared")
    assert pair.matching.how["dense_1.weight"] == "a.kernel, transposed (by value)"
    assert pair.compare().ok


def test_torchs_weights_can_be_the_ones_that_count():
    module = Torch()
    pair = Pair(Flax(), module, inputs=[X], params=params_of(), weights="torch")
    outputs, _ = pair.run_torch("float32")
    assert np.allclose(outputs[0], module(torch.tensor(X, dtype=torch.float32)).detach().numpy(), atol=1e-6)
    assert pair.compare().ok


def test_a_stack_of_layers_and_heads_in_an_axis_are_found():
    rng = np.random.default_rng(0)
    leaves = {"layers.proj.weight": rng.standard_normal((3, 4, 5)), "query.kernel": rng.standard_normal((6, 2, 4))}
    tensors = {f"layers.{i}.proj.weight": leaves["layers.proj.weight"][i] * 0 for i in range(3)}
    tensors["query.weight"] = np.zeros((8, 6))
    found = match(tensors, leaves)
    assert not found.missing
    assert not found.unused
    assert np.array_equal(found.sources["layers.2.proj.weight"](leaves), leaves["layers.proj.weight"][2])
    assert np.array_equal(found.sources["query.weight"](leaves), leaves["query.kernel"].reshape(6, 8).T)


def test_what_has_no_partner_or_two_is_said_by_name():
    tensors = {"encoder.weight": np.zeros((3, 3)), "extra": np.zeros(7)}
    found = match(tensors, {"left.w": np.ones((3, 3)), "right.w": np.ones((3, 3)) * 2})
    assert "could be left.w or right.w" in found.missing["encoder.weight"]
    assert "no leaf left of shape (7,)" in found.missing["extra"]
    pair = Pair(lambda p, x: x, torch.nn.Linear(2, 2), inputs=[X], params={"w": np.ones((3, 3), np.float32)})
    comparison = pair.compare()
    assert not comparison.ok
    assert len(comparison.rows) == 1
    assert "JAX's w is not used" in comparison.rows[0].note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": {"nope.weight": "x"}}, "torch has no parameter 'nope.weight'"),
        ({"names": {"dense_0.weight": "params.Nope"}}, "cannot be made of"),
        ({"names": {"dense_0.weight": lambda leaves: leaves["params.Dense_0.kernel"]}}, r"makes \(12, 16\)"),
        ({"weights": "mine"}, "must be 'jax', 'torch' or 'shared'"),
        ({"params": None}, "give params="),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        Pair(Flax(), Torch(), inputs=[X], **({"params": params_of()} | arguments))


class Parameterless(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.scale, self.f = torch.nn.Parameter(torch.ones(())), f

    def forward(self, x):
        return self.f(x * self.scale)


SCALE = {"scale": np.ones((), np.float32)}


def test_integer_outputs_are_counted_and_several_outputs_told_apart():
    module = Parameterless(lambda x: {"values": x, "best": x.argmax(-1)})
    same = Pair(lambda p, x: (x * p["scale"], (x * p["scale"]).argmax(-1)), module, inputs=[X], params=SCALE)
    assert same.compare().ok
    other = Pair(lambda p, x: (x * p["scale"], (-x * p["scale"]).argmax(-1)), module, inputs=[X], params=SCALE)
    bad = [row for row in other.compare().rows if not row.ok]
    assert [row.item for row in bad] == [
        "output 1, int64: elements that differ",
        "output 1, int32: elements that differ",
    ]
    assert bad[0].measured == 5


def test_nan_is_equal_to_nan_in_the_same_place_alone():
    module = Parameterless(torch.log)
    same = Pair(lambda p, x: jnp.log(x * p["scale"]), module, inputs=[X], params=SCALE).compare(["float64"])
    assert next(row for row in same.rows if row.check == "outputs").ok
    assert "are not finite on both sides" in same.rows[1].note
    other = Pair(lambda p, x: jnp.log(jnp.abs(x * p["scale"])), module, inputs=[X], params=SCALE).compare(["float64"])
    row = next(row for row in other.rows if row.check == "outputs")
    assert (row.ok, row.side) == (False, TORCH)
    assert "0 elements in JAX, 28 in torch" in row.note or "not finite" in row.note


def test_another_shape_is_said():
    pair = Pair(lambda p, x: (x * p["scale"]).T, Parameterless(lambda x: x), inputs=[X], params=SCALE)
    row = pair.compare(["float64"]).rows[1]
    assert (row.ok, row.note) == (False, "JAX's shape is (12, 5), torch's (5, 12)")


@pytest.mark.parametrize(("wrong", "side"), [("jax", JAX), ("torch", TORCH)])
def test_a_witness_tells_who(wrong, side):
    factor = {"jax": (1.1, 1.0), "torch": (1.0, 1.1)}[wrong]
    pair = Pair(
        lambda p, x: x * p["scale"] * factor[0],
        Parameterless(lambda x: x * factor[1]),
        inputs=[X],
        params=SCALE,
        witness=lambda weights, x: x * weights["scale"],
    )
    assert {row.side for row in pair.compare().rows if row.check == "outputs"} == {side}


def test_optimizers_with_other_defaults_are_told_apart():
    params = {"w": np.random.default_rng(0).standard_normal((4, 6)), "b": np.ones(4)}
    make = lambda p: torch.optim.AdamW(p, 1e-3)
    assert all(row.ok for row in compare_optimizers(optax.adamw(1e-3, weight_decay=1e-2), make, params))
    defaults = compare_optimizers(optax.adamw(1e-3), make, params)
    assert not any(row.ok for row in defaults)
    assert {row.side for row in defaults} == {EITHER}
    eps = compare_optimizers(optax.adamw(1e-3, weight_decay=1e-2, eps=1e-7), make, params, dtypes=("float64",))
    assert not any(row.ok for row in eps)
    still = compare_optimizers(optax.sgd(0.0), lambda p: torch.optim.SGD(p, 0.0), params)
    assert not any(row.ok for row in still), "an optimizer that does nothing must fail"


class NnxModel(nnx.Module):
    def __init__(self, rngs, eps=1e-5):
        self.dense_0, self.dense_1 = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.layer_norm_0 = nnx.LayerNorm(16, epsilon=eps, rngs=rngs)

    def __call__(self, x):
        return self.dense_1(self.layer_norm_0(nnx.gelu(self.dense_0(x), approximate=False)))


def test_nnx_modules_hold_their_own_parameters_and_are_traced():
    assert assert_same(NnxModel(nnx.Rngs(0)), Torch(), inputs=[X]).ok
    comparison = Pair(NnxModel(nnx.Rngs(0), eps=1e-4), Torch(), inputs=[X]).compare()
    assert not comparison.ok
    assert "differ first at layer_norm_0" in comparison.verdict()


def test_equinox_modules_are_pytrees_that_can_be_called():
    eqx = pytest.importorskip("equinox")

    class Equinox(eqx.Module):
        dense_0: eqx.nn.Linear
        dense_1: eqx.nn.Linear

        def __call__(self, x):
            return jax.vmap(self.dense_1)(jax.nn.relu(jax.vmap(self.dense_0)(x)))

    a, b = jax.random.split(jax.random.key(0))
    model = Equinox(eqx.nn.Linear(12, 16, key=a), eqx.nn.Linear(16, 16, key=b))
    module = torch.nn.Sequential()
    module.dense_0, module.relu, module.dense_1 = torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16)
    comparison = assert_same(model, module, inputs=[X])
    assert comparison.matching.how["dense_1.weight"] == "dense_1.weight (by shape and name)"  # (out, in) on both sides


@pytest.mark.parametrize("name", ["mlp", "attention", "against_transformers"])
def test_the_examples_agree(name):
    made = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    (pair,) = [value for value in made.values() if isinstance(value, Pair)]
    assert pair.compare().ok


def test_the_optimizer_example_shows_the_defaults_apart():
    made = runpy.run_path(str(ROOT / "examples" / "adamw.py"))
    assert all(row.ok for row in made["same"])
    assert not any(row.ok for row in made["defaults"])


def test_leaves_are_named_by_their_path():
    assert list(leaves_of({"a": [np.ones(2, np.float32), np.ones(3, np.int32)], "b": {"c": np.ones(1)}})) == [
        "a.0",
        "b.c",
    ]
