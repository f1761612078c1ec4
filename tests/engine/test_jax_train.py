"""Properties of JAX training: loss, clip, AdamW, skipped steps, resuming. The twin is test_torch_train.py."""

import dataclasses
import json
from copy import deepcopy
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_llm import optim
from jax_llm.engine import device
from jax_llm.engine.checkpoint import from_canonical, to_canonical
from jax_llm.engine.device import select_device
from jax_llm.engine.diagnose import first_not_finite
from jax_llm.engine.evaluate import evaluator
from jax_llm.engine.gradients import loss_and_grads
from jax_llm.engine.plan import make_model
from jax_llm.engine.run import fit_and_save
from jax_llm.engine.train import Metrics, fit, init_state, make_train_step, with_deferred_count
from jax_llm.loss import cross_entropy
from jax_llm.model import CausalLM
from llm_common.config import OptimizerConfig, Recipe, RunConfig, TrainConfig, preset
from llm_common.data.evaluation import Evaluation
from llm_common.errors import UserError
from llm_common.run.checkpoint import latest_checkpoint, load_checkpoint
from llm_common.run.folder import Run
from llm_common.run.log import read_log
from llm_common.schedule import StepScalars, step_scalars
from llm_common.text.tokenizer import Tokenizer
from parity import spec
from parity.core.inputs import RandomBatches, random_batch, random_weights, start_state
from parity.sides.jax_side import JaxSide

CFG = preset("tiny")
OPT = OptimizerConfig(lr_max=1e-2, warmup_steps=2, total_steps=12)
RECIPE = Recipe(CFG, TrainConfig(batch_size=3, seq_len=13), OPT)


def recipe(opt=None, **settings):
    return Recipe.from_settings(CFG, {"batch_size": 3, "seq_len": 13} | settings, opt or OPT)


class Batches(RandomBatches):
    def fingerprint(self):
        return {"tokens": 1}


def train(folder, opt=OPT, on_step=None, tokenizer=None, **config):
    """A run on the CPU; `on_step` is given each step's row."""
    tell = lambda row: on_step(row) if on_step and "event" not in row else None
    config = RunConfig(**config)
    recipe = dataclasses.replace(RECIPE, optimizer=opt)
    run = Run(folder, recipe, Batches(CFG, 0), "jax", tokenizer=tokenizer, config=config, on_event=tell)
    return fit_and_save(run, "cpu")


def test_loss_counts_only_real_targets():
    logits = jnp.array(np.random.default_rng(0).standard_normal((2, 3, 5)), jnp.float32)
    targets = jnp.array([[0, -100, 4], [-100, -100, 1]])
    log_probs = jax.nn.log_softmax(logits)
    expected = -(log_probs[0, 0, 0] + log_probs[0, 2, 4] + log_probs[1, 2, 1]) / 3
    assert cross_entropy(logits, targets) == pytest.approx(float(expected), rel=1e-6)


def test_no_counted_target_is_loss_zero_with_zero_gradients():
    loss, gradient = jax.value_and_grad(cross_entropy)(jnp.ones((1, 2, 5)), jnp.full((1, 2), -100))
    assert loss == 0
    assert (gradient == 0).all()


def test_clip_is_exact_and_safe_at_zero():
    clip = lambda grads, max_norm: optim.clip(max_norm).update(grads, optax.EmptyState())[0]
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    np.testing.assert_array_equal(clip(grads, 1.0)["a"], np.float32(3) * np.float32(0.2))
    for max_norm in (None, 10.0, 5.0):
        assert clip(grads, max_norm)["b"] == 4.0
    assert (clip({"a": jnp.zeros(2)}, 1.0)["a"] == 0).all()


def test_adamw_trains_any_pytree():
    optimizer = optim.adamw(0.9, 0.95, 1e-8, 0.5)
    params = (jnp.ones((2, 2)), {"gain": jnp.ones(3)})
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params, scalars=StepScalars(0.1, 0.1, 0.05))
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new[0], 0.95)  # decayed by lr * weight_decay
    np.testing.assert_array_equal(new[1]["gain"], 1.0)


def test_stacked_norm_weights_do_not_decay():
    mask = optim.decay_mask(CFG)
    assert not mask["model"]["layers"]["input_layernorm"]["weight"]  # a stacked leaf of two axes
    assert mask["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert mask["model"]["embed_tokens"]["weight"]


def test_train_step_is_pure_and_takes_optax_optimizers():
    state = init_state(RECIPE)
    inputs, targets = (jnp.array(x) for x in Batches(CFG, 0).batch(0))
    adamw = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1)
    state = state._replace(opt_state=adamw.init(state.params))
    step = jax.jit(make_train_step(CausalLM(CFG), adamw, "float32"))
    results = [step(state, inputs, targets, step_scalars(OPT, 1, 0))[0] for _ in range(2)]
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(results[0].step) == 1
    assert not np.array_equal(results[0].params["model"]["norm"]["weight"], state.params["model"]["norm"]["weight"])


def test_training_lowers_the_loss_in_bfloat16_with_float32_masters():
    losses = []
    data = Batches(CFG, 0, n=1)
    narrow = recipe(compute_dtype="bfloat16")
    state = fit(init_state(narrow), narrow, data, on_step=lambda s, _, m: losses.append(m["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_skips_stop_the_run_with_a_diagnosis():
    state = init_state(RECIPE)
    state.params["model"]["norm"]["weight"] = jnp.full(CFG.hidden_size, jnp.inf)
    steps = []
    with pytest.raises(UserError, match="not finite in 10 steps in a row.*is the first tensor that is not finite"):
        fit(
            state,
            RECIPE,
            Batches(CFG, 0),
            on_step=lambda step, s, m: steps.append((step, m["skipped"], int(s.adam_count))),
        )
    assert steps == [(n, True, 0) for n in range(1, 11)]


def test_bias_corrections_follow_the_updates_made_though_a_step_is_begun_before_the_last_is_read():
    skipped, seen = {2, 3, 6}, []

    def step(state, inputs, targets, scalars):
        skip = int(state.step) in skipped
        seen.append((int(state.adam_count), float(scalars.bias_correction1)))
        new = state._replace(step=state.step + 1, adam_count=state.adam_count + (not skip))
        return new, Metrics(jnp.zeros(()), jnp.zeros(()), jnp.array(skip))

    fit(init_state(RECIPE), RECIPE, Batches(CFG, 0), 9, train_step=with_deferred_count(step))
    assert [count for count, _ in seen] == [0, 1, 2, 2, 2, 3, 4, 4, 5]
    np.testing.assert_allclose([c for _, c in seen], [1 - OPT.beta1 ** (n + 1) for n, _ in seen], rtol=1e-6)


def grads_of(recipe, seed=0):
    """Loss and gradients in float64 of a batch whose micro-batches count different numbers of targets."""
    with jax.enable_x64(True):
        params = from_canonical(CFG, random_weights(CFG, 0), jnp.float64)
        ids, targets = random_batch(CFG, seed, 6, 9)
        targets[2:4] = -100
        targets[0, 1:] = -100
        run = jax.jit(
            lambda p, x, y: loss_and_grads(
                make_model(recipe, "cpu"), p, x, y, recipe.execution.gradient_accumulation_steps
            )
        )
        loss, grads = run(params, jnp.array(ids), jnp.array(targets))
        return float(loss), to_canonical(CFG, grads)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 6},
        {"remat": "full"},
        {"remat": "dots"},
        {"scan_layers": True},
        {"gradient_accumulation_steps": 3, "remat": "full", "scan_layers": True},
    ],
)
def test_ways_to_save_memory_change_nothing(settings):
    exact = grads_of(recipe(batch_size=6, compute_dtype="float64"))
    loss, grads = grads_of(recipe(batch_size=6, compute_dtype="float64", **settings))
    assert loss == pytest.approx(exact[0], rel=1e-14)
    for name, x in exact[1].items():
        np.testing.assert_allclose(grads[name], x, atol=1e-14)


def test_rematerialisation_keeps_less():
    """What the backward pass keeps of the forward pass, in bytes: "full" keeps the least."""
    kept = {}
    params = from_canonical(CFG, random_weights(CFG, 0), jnp.float32)
    ids, targets = (jnp.array(x) for x in random_batch(CFG, 0, 3, 13))
    for remat in ("none", "dots", "full"):
        model = make_model(recipe(remat=remat), "cpu")
        loss = lambda p, model=model: cross_entropy(model.apply({"params": p}, ids)[0], targets)
        kept[remat] = sum(x.size for x in jax.tree.leaves(jax.vjp(loss, params)[1]))
    assert kept["full"] < kept["dots"] < kept["none"]


def test_a_run_that_is_not_compiled_is_the_same_run():
    compiled, loose = (fit(init_state(RECIPE), recipe(compile=how), Batches(CFG, 0), 2).params for how in ("on", "off"))
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(loose), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_evaluation_is_the_mean_loss_of_all_tokens():
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, 50)
    evaluation = Evaluation(tokens, 9, 2)
    with evaluator(recipe(compute_dtype="float64"), random_weights(CFG, 0), "cpu") as evaluate:
        total, count = evaluate(evaluation)
    expected = 0.0
    for start in range(0, 49, 9):
        window = tokens[start : start + 10]
        logits = spec.forward(random_weights(CFG, 0), window[None, :-1], CFG)[0]
        expected += spec.cross_entropy(logits, window[None, 1:]) * (len(window) - 1)
    assert count == 49
    assert total == pytest.approx(expected, rel=1e-13)


def not_finite(change, **settings):
    """What `first_not_finite` says of weights that were changed."""
    weights = random_weights(CFG, 0, "float32")
    change(weights)
    ids, targets = random_batch(CFG, 0)
    params = from_canonical(CFG, weights, jnp.float32)
    return first_not_finite(make_model(recipe(**settings), "cpu"), params, jnp.array(ids), jnp.array(targets))


def test_the_first_tensor_that_is_not_finite_is_named():
    name = "model.layers.1.mlp.down_proj.weight"
    assert f"the weight {name} is the first" in not_finite(lambda w: w[name].fill(np.nan))

    def overflow(weights):
        weights["model.layers.1.mlp.gate_proj.weight"] *= 1e30
        weights["model.layers.1.mlp.up_proj.weight"] *= 1e30

    for settings in ({}, {"remat": "full"}, {"scan_layers": True}):
        assert "the output of model.layers.1.mlp.down_proj is the first" in not_finite(overflow, **settings)
    assert "are finite now" in not_finite(lambda w: None)


def test_resumed_is_bitwise_uninterrupted(tmp_path):
    straight = train(tmp_path / "a")

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "b", save_every=3, on_step=kill)
    assert latest_checkpoint(tmp_path / "b").name == "step-00000006"
    seen = []
    resumed = train(tmp_path / "b", on_step=lambda row: seen.append(row["step"]))
    assert seen == list(range(7, 13))
    rows = read_log(tmp_path / "b" / "log.jsonl")
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, 13))
    assert [row["step"] for row in rows if row.get("event") == "start"] == [0, 6]
    states = [load_checkpoint(folder)[1] for folder in (straight, resumed)]
    for part in ("weights", "mu", "nu"):
        for name, x in getattr(states[0], part).items():
            np.testing.assert_array_equal(x, getattr(states[1], part)[name])
    assert json.loads((resumed / "state.json").read_text())["settings"]["framework"] == "jax"


def test_a_finished_run_is_left_as_it_is(tmp_path):
    folder = train(tmp_path, tokenizer=Tokenizer([]))
    before = (folder / "state.json").stat().st_mtime_ns
    assert train(tmp_path, tokenizer=Tokenizer([])) == folder
    assert (folder / "state.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="`tokenizer` is another"):
        train(tmp_path, tokenizer=Tokenizer([(b"a", b"b")]))


@pytest.mark.parametrize(("part", "token"), [(0, 96), (1, -1), (1, 96)])
def test_token_ids_out_of_range_stop_training(part, token):
    data = Batches(CFG, 0)
    data.batches[0][part][0, 0] = token
    with pytest.raises(UserError, match=f"step 0, (inputs|targets): token id {token} is outside"):
        fit(init_state(RECIPE), RECIPE, data)


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    train(tmp_path)
    other = OptimizerConfig(lr_max=2e-2, warmup_steps=2, total_steps=12)
    with pytest.raises(UserError, match="`lr_max` = 0.01 here, 0.02 asked for"):
        train(tmp_path, other)


def test_bad_settings_are_refused_before_work():
    with pytest.raises(UserError, match="seq_len needs 65 positions"):
        fit(init_state(RECIPE), recipe(seq_len=65), Batches(CFG, 0))
    with pytest.raises(UserError, match="JAX_ENABLE_X64=1"):
        init_state(recipe(compute_dtype="float64"))
    with pytest.raises(UserError, match="JAX sees no tpu here, only: cpu"):
        select_device("tpu")


def test_a_float32_run_has_the_same_bits_where_somebody_switched_float64_on():
    side, data = JaxSide(CFG, "float32"), RandomBatches(CFG, 0, batch=2, length=9)
    state = start_state(random_weights(CFG, 0, "float32"), "float32")
    opt = OptimizerConfig(total_steps=4)
    expected, scope = side.train(deepcopy(state), opt, data, 3), lambda: device.x64("float32")
    with jax.enable_x64(True), mock.patch.object(JaxSide, "scope", side_effect=scope):
        found = side.train(deepcopy(state), opt, data, 3)
    for name, x in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], x, err_msg=name)
