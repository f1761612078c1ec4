"""Properties of torch training: loss, clip, AdamW, skipped steps, resuming. The twin is test_jax_train.py."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from llm_common.config import OptimizerConfig, Recipe, RunConfig, SamplingConfig, TrainConfig, preset
from llm_common.data.evaluation import Evaluation
from llm_common.errors import UserError
from llm_common.run.checkpoint import latest_checkpoint, load_checkpoint
from llm_common.run.folder import Run
from llm_common.run.log import read_log
from llm_common.text.tokenizer import Tokenizer
from parity import spec
from parity.core.inputs import RandomBatches, random_batch, random_weights
from torch_llm import optim
from torch_llm.engine.checkpoint import from_canonical, to_canonical, to_training_state
from torch_llm.engine.device import matmul_precision, select_device
from torch_llm.engine.diagnose import first_not_finite
from torch_llm.engine.evaluate import evaluator
from torch_llm.engine.generate import generate
from torch_llm.engine.gradients import loss_and_grads
from torch_llm.engine.run import fit_and_save
from torch_llm.engine.train import Trainer
from torch_llm.fast import optim as fast_optim
from torch_llm.fast.kernels import make_kernels
from torch_llm.loss import cross_entropy
from torch_llm.model import empty_model
from torch_llm.optim import make_optimizer

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
    run = Run(folder, recipe, Batches(CFG, 0), "torch", tokenizer=tokenizer, config=config, on_event=tell)
    return fit_and_save(run, "cpu")


def test_loss_counts_only_real_targets():
    logits = torch.tensor(np.random.default_rng(0).standard_normal((2, 3, 5)), dtype=torch.float32)
    targets = torch.tensor([[0, -100, 4], [-100, -100, 1]])
    log_probs = torch.log_softmax(logits, -1)
    expected = -(log_probs[0, 0, 0] + log_probs[0, 2, 4] + log_probs[1, 2, 1]) / 3
    assert cross_entropy(logits, targets).item() == pytest.approx(float(expected), rel=1e-6)


def test_no_counted_target_is_loss_zero_with_zero_gradients():
    logits = torch.ones(1, 2, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2), -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_clip_is_exact_and_safe_at_zero():
    norm = optim.global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    assert norm == 5.0
    assert optim.clip_factor(norm, 1.0) == np.float32(0.2)
    for max_norm in (None, 10.0, 5.0):
        assert optim.clip_factor(norm, max_norm) == 1.0
    assert optim.clip_factor(optim.global_norm([torch.zeros(2)]), 1.0) == 1.0


def test_adamw_trains_any_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = optim.make_optimizer(OptimizerConfig(lr_max=0.1, weight_decay=0.5), module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()  # without a gradient: only decay, and only of matrices
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1.0))


def test_generating_first_does_not_spoil_training():
    trainer = Trainer(RECIPE)
    generate(trainer.model, [[1, 2]], 3, SamplingConfig())
    trainer.fit(Batches(CFG, 0), until_step=1)


def test_tf32_is_not_left_switched_on():
    before = torch.get_float32_matmul_precision()
    inside = []
    for dtype in ("float32", "bfloat16"):
        with matmul_precision(dtype):
            inside.append(torch.get_float32_matmul_precision())
    assert inside == ["highest", "high"]
    assert torch.get_float32_matmul_precision() == before


def test_a_copied_optimizer_keeps_its_count():
    module = torch.nn.Linear(2, 2)
    optimizer = optim.make_optimizer(OptimizerConfig(), module)
    optimizer.step()
    assert copy.deepcopy(optimizer).count == 1


def test_the_norm_of_no_gradients_is_zero():
    assert optim.global_norm([]) == 0


def test_optimizer_state_dict_round_trip():
    module = torch.nn.Linear(2, 2)
    optimizer = optim.make_optimizer(OptimizerConfig(), module)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = optim.make_optimizer(OptimizerConfig(), module)
    other.load_state_dict(optimizer.state_dict())
    assert other.count == 1
    assert torch.equal(other.moments(module.weight)[0], optimizer.moments(module.weight)[0])


def test_training_lowers_the_loss_in_bfloat16_with_float32_masters():
    losses = []
    trainer = Trainer(recipe(compute_dtype="bfloat16"))
    trainer.fit(Batches(CFG, 0, n=1), on_step=lambda step, t, m: losses.append(m["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    masters = trainer.masters()
    assert {x.dtype for x in masters.values()} == {torch.float32}
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, masters[name].bfloat16())
        assert {x.dtype for x in trainer.optimizer.moments(p)} == {torch.float32}
    assert any((x != x.bfloat16()).any() for x in masters.values())


def test_the_optimizers_state_keeps_its_width():
    """`torch.optim.Optimizer` rounds what it loads to the dtype of the parameter."""
    trainers = [Trainer(recipe(compute_dtype="bfloat16")) for _ in range(2)]
    trainers[0].fit(Batches(CFG, 0), 2)
    trainers[1].optimizer.load_state_dict(trainers[0].optimizer.state_dict())
    for p, q in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        pairs = zip(trainers[0].optimizer.moments(p), trainers[1].optimizer.moments(q), strict=True)
        for x, y in (*pairs, (trainers[0].optimizer.master(p), trainers[1].optimizer.master(q))):
            assert x.dtype == y.dtype == torch.float32
            assert torch.equal(x, y)
            assert x.data_ptr() != y.data_ptr()


def test_skips_stop_the_run_with_a_diagnosis():
    trainer = Trainer(RECIPE)
    torch.nn.init.constant_(trainer.model.model.norm.weight, torch.inf)
    steps = []
    hook = lambda step, t, m: steps.append((step, m["skipped"], t.optimizer.count))
    with pytest.raises(UserError, match="not finite in 10 steps in a row.*is the first tensor that is not finite"):
        trainer.fit(Batches(CFG, 0), on_step=hook)
    assert steps == [(n, True, 0) for n in range(1, 11)]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_the_compiled_update_takes_parameters_of_any_shape_and_dtype(dtypes, monkeypatch):
    monkeypatch.setattr(fast_optim, "compiled_update", lambda: fast_optim.clipped_update)
    updated = []
    for compiled in (False, True):
        parameters = [
            torch.nn.Parameter(torch.ones(shape, dtype=x)) for shape, x in zip([(), (2, 3)], dtypes, strict=True)
        ]
        kind = fast_optim.CompiledAdamW if compiled else optim.AdamW
        optimizer = kind(parameters, 1e-3, (0.9, 0.95), 1e-8, 0.1)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.full_like(p, 0.3)
            optimizer.step()
        updated.append(parameters)
    for a, b in zip(*updated, strict=True):  # a few roundings of the parameter's own dtype, which is near 1
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(a.dtype).eps, atol=0)


def test_a_step_that_is_not_waited_for_updates_as_one_that_is(monkeypatch):
    monkeypatch.setattr(fast_optim, "compiled_update", lambda: fast_optim.clipped_update)
    states = []
    for ahead in (False, True):
        trainer = Trainer(RECIPE)
        if ahead:  # as on a GPU, but for the compiler
            trainer.compiled, trainer.optimizer = True, make_optimizer(OPT, trainer.model, fast_optim.CompiledAdamW)
        honest = trainer.loss_and_grads

        def sometimes_not_finite(inputs, targets, trainer=trainer, honest=honest):
            loss = honest(inputs, targets)
            if trainer.step in (2, 3, 6):
                trainer.model.model.norm.weight.grad.fill_(torch.nan)
            return loss

        trainer.loss_and_grads = sometimes_not_finite
        skipped = []
        trainer.fit(Batches(CFG, 0), 9, on_step=lambda step, t, m, skipped=skipped: skipped.append(m["skipped"]))
        assert [i for i, x in enumerate(skipped) if x] == [2, 3, 6]
        states.append(to_training_state(trainer))
    assert states[0].adam_count == states[1].adam_count == 6
    for name, weight in states[0].weights.items():
        np.testing.assert_allclose(states[1].weights[name], weight, rtol=1e-5, atol=1e-8)


def grads_of(recipe, seed=0):
    """Loss and gradients in float64 of a batch whose micro-batches count different numbers of targets."""
    model = empty_model(CFG, torch.float64, "cpu", make_kernels(remat=recipe.execution.remat))
    from_canonical(model, random_weights(CFG, 0))
    ids, targets = random_batch(CFG, seed, 6, 9)
    targets[2:4] = -100
    targets[0, 1:] = -100
    steps = recipe.execution.gradient_accumulation_steps
    loss = loss_and_grads(model, torch.tensor(ids), torch.tensor(targets), steps)
    return float(loss), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 6},
        {"remat": "full"},
        {"remat": "dots"},
        {"gradient_accumulation_steps": 3, "remat": "full"},
    ],
)
def test_ways_to_save_memory_change_nothing(settings):
    exact = grads_of(recipe(batch_size=6, compute_dtype="float64"))
    loss, grads = grads_of(recipe(batch_size=6, compute_dtype="float64", **settings))
    assert loss == pytest.approx(exact[0], rel=1e-14)
    for name, x in exact[1].items():
        np.testing.assert_allclose(grads[name], x, atol=1e-14)


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_what_is_computed_again_has_the_rounded_weights(remat, chunks):
    """In bfloat16, uncompiled: the backward pass finds the weights of the forward pass."""
    grads = {}
    for way in ("none", remat):
        trainer = Trainer(
            recipe(
                batch_size=6, seq_len=9, compute_dtype="bfloat16", remat=way, loss_chunks=chunks,
                gradient_accumulation_steps=2, compile="off", attention_backend="reference",
            )
        )  # fmt: skip
        ids, targets = (torch.tensor(x) for x in random_batch(CFG, 0, 6, 9))
        trainer.loss_and_grads(ids, targets)
        grads[way] = {name: optim.gradient(p).clone() for name, p in trainer.model.named_parameters()}
        assert all(g.dtype == torch.float32 for g in grads[way].values())
    for name, x in grads["none"].items():
        assert torch.equal(grads[remat][name], x), name


def test_rematerialisation_keeps_less():
    """What the backward pass keeps of the forward pass, in elements: "full" keeps the least."""
    kept = {}
    ids, targets = (torch.tensor(x) for x in random_batch(CFG, 0, 3, 13))
    for remat in ("none", "full"):
        model, sizes = empty_model(CFG, torch.float32, "cpu", make_kernels(remat=remat)).init_weights(0), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            cross_entropy(model(ids), targets)
        kept[remat] = sum(sizes)
    assert kept["full"] < kept["none"] / 2


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run():
    results = []
    for how in ("on", "off"):
        trainer = Trainer(recipe(compile=how))
        trainer.fit(Batches(CFG, 0), 4)
        results.append(to_canonical(trainer.model))
    for name, x in results[0].items():
        np.testing.assert_allclose(x, results[1][name], atol=1e-4)


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
    model = empty_model(CFG, torch.float32, "cpu", make_kernels(**settings))
    return first_not_finite(from_canonical(model, weights), torch.tensor(ids), torch.tensor(targets))


def test_the_first_tensor_that_is_not_finite_is_named():
    name = "model.layers.1.mlp.down_proj.weight"
    assert f"the weight {name} is the first" in not_finite(lambda w: w[name].fill(np.nan))

    def overflow(weights):
        weights["model.layers.1.mlp.gate_proj.weight"] *= 1e30
        weights["model.layers.1.mlp.up_proj.weight"] *= 1e30

    for settings in ({}, {"remat": "full"}):
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
    assert json.loads((resumed / "state.json").read_text())["settings"]["framework"] == "torch"


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
        Trainer(RECIPE).fit(data)


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    train(tmp_path)
    other = OptimizerConfig(lr_max=2e-2, warmup_steps=2, total_steps=12)
    with pytest.raises(UserError, match="`lr_max` = 0.01 here, 0.02 asked for"):
        train(tmp_path, other)


def test_bad_settings_are_refused_before_work():
    with pytest.raises(UserError, match="seq_len needs 65 positions"):
        Trainer(recipe(seq_len=65))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch cannot use device 'cuda' here.*present: cpu"):
            select_device("gpu")
    with pytest.raises(UserError, match="torch cannot use device 'abacus'"):
        select_device("abacus")
