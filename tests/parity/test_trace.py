"""The trace: clean models have no fault at any point, and a bug is placed where it is, not where it shows first or
last.
"""

import dataclasses

import numpy as np
import pytest

from parity.core.compare import BOTH, JAX, SHARED, TORCH
from parity.core.inputs import variants
from parity.core.planting import Edit, planted
from parity.mutants.score import uncompiled
from parity.sides.settings import Settings
from parity.trace.points import Point, given, specification
from parity.trace.trace import local_allowed, own_errors, trace

S = Settings()
NORM = "torch_llm.layers:RMSNorm.forward"


@pytest.mark.parametrize("name", variants(S.cfg))
def test_every_module_given_identical_inputs_agrees_in_float64(name):
    found = trace(S, variants(S.cfg)[name])
    assert found.faults() == (None, None)
    assert max(max(own_errors(side)) for side in found.sides) < local_allowed("float64") / 10
    assert "No difference" in found.sentence()
    names = [p.name for p in found.sides[0].points]
    assert {"model.embed_tokens", "model.layers.1.self_attn.attention", "model.layers.0.mlp.swiglu", "lm_head"} <= set(
        names
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_low_precision_one_module_errs_by_a_few_roundings(dtype):
    found = trace(S, dtype=dtype)
    assert found.faults() == (None, None)
    assert max(max(own_errors(side)) for side in found.sides) > 0


def deep() -> Settings:
    return dataclasses.replace(S, cfg=dataclasses.replace(S.cfg, num_hidden_layers=4))


def test_an_error_of_the_third_layer_alone_is_placed_there():
    edit = Edit(
        "torch_llm.model:DecoderLayer.forward",
        "self.mlp(self.post_attention_layernorm(x))",
        "self.mlp(self.post_attention_layernorm(x)) * (1.001 if layer == 2 else 1.0)",
    )
    with planted([edit]):
        found = trace(deep(), optimizer=False)
    assert (found.side(), found.place()) == (TORCH, "model.layers.2")
    assert "torch differs first at model.layers.2" in found.sentence()
    assert "JAX agrees with the specification to" in found.sentence()


def test_two_bugs_of_one_side_are_judged_alone():
    edits = [
        Edit("torch_llm.layers:swiglu", "upcast(up)", "1.01 * upcast(up)"),
        Edit("torch_llm.layers:rms_norm", "+ eps".strip("+ "), "2 * eps"),
    ]
    with planted(edits):
        found = trace(S, optimizer=False)
    bad = [p.name for p in found.sides[1].points if p.output > found.allowed]
    assert all(name.endswith(("layernorm", "norm", "swiglu")) for name in bad)
    assert len(bad) == 2 * 2 + 1 + 2  # two norms a layer, the last norm, one swiglu a layer


def test_a_bug_on_each_side_names_both():
    edits = [
        Edit("torch_llm.layers:swiglu", "upcast(up)", "1.01 * upcast(up)"),
        Edit("jax_llm.attention:reference_attention", "h**-0.5", "h**-0.51"),
    ]
    with planted(edits):
        found = trace(S, optimizer=False)
    assert found.side() == BOTH
    assert "JAX differs first at model.layers.0.self_attn.attention" in found.sentence()
    assert "torch at model.layers.0.mlp.swiglu" in found.sentence()


def test_a_backward_alone_is_placed_on_the_way_back():
    edit = Edit(
        NORM, "self.function(x, self.weight, self.eps)", "self.function(x, self.weight, self.eps) + 0 * x.mean()"
    )
    with planted([edit]):  # nothing changes: the control
        assert trace(S, optimizer=False).faults() == (None, None)
    edit = Edit(
        NORM,
        "self.function(x, self.weight, self.eps)",
        "self.function(x, self.weight, self.eps) + (x - x.detach()) * 1e-6",
    )
    with planted([edit]):
        found = trace(S, optimizer=False)
    assert (found.side(), found.place()) == (TORCH, "model.norm")
    assert "gradient" in found.sentence()


def test_a_side_that_raises_is_a_finding():
    with planted([Edit("jax_llm.layers:swiglu", "...", "raise ValueError('broken')")]):
        found = trace(S, optimizer=False)
    assert found.side() == JAX
    assert "raised ValueError: broken" in found.sentence()


def test_the_optimizer_is_traced_from_given_gradients():
    edits = [Edit("llm_common.schedule:learning_rate", "0.5", "0.6")]
    with planted(edits):
        found = trace(S)
    assert (found.side(), found.place()) == (SHARED, "optimizer: update")
    assert "as if -lr = -0.00" in found.sentence()
    with planted([Edit("jax_llm.optim:adamw", "(1.0 - beta1) * g", "g")]), uncompiled():
        found = trace(S)
    assert (found.side(), found.place()) == (JAX, "optimizer: mu")
    assert "as if beta1 = 0.9 for 0.9, (1 - beta1) x clip factor = 1 for 0.1" in found.sentence()


def test_the_specifications_points_fit_together():
    """What one point puts out is what the next takes in, forward and backward."""
    from parity.core.inputs import random_batch, random_weights

    weights = random_weights(S.cfg, 0)
    ids, targets = random_batch(S.cfg, 0)
    points, _, _ = specification(weights, ids, targets, S.cfg)
    at: dict[str, Point] = {p.name: p for p in points}
    assert np.array_equal(at["model.embed_tokens"].output, at["model.layers.0"].inputs[0])
    assert np.array_equal(at["model.layers.1"].output, at["model.norm"].inputs[0])
    assert np.allclose(at["lm_head"].d_inputs[0], at["model.norm"].d_output, atol=1e-15)
    for p in points:
        assert p.output.shape == p.d_output.shape
        assert all(x.shape == d.shape for x, d in zip(p.inputs, p.d_inputs, strict=False))
    forward, backward = given(points)
    assert set(backward) <= set(forward)
