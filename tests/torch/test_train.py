"""Properties of torch training: loss, clip, AdamW, skipped steps, resuming. The twin is tests/jax/test_train.py."""

import copy
import json

import numpy as np
import pytest
import torch

from llm_common.checkpoint import latest_checkpoint, load_checkpoint
from llm_common.config import OptimizerConfig, RunConfig, SamplingConfig, TrainConfig, preset
from llm_common.errors import UserError
from llm_common.run import Run
from llm_common.run_log import read_log
from llm_common.tokenizer import Tokenizer
from parity.cases import RandomBatches
from torch_llm import optim
from torch_llm.generate import generate
from torch_llm.loss import cross_entropy
from torch_llm.run import fit_and_save
from torch_llm.train import Trainer, matmul_precision, select_device

CFG = preset("tiny")
TRAIN = TrainConfig(batch_size=3, seq_len=13)
OPT = OptimizerConfig(lr_max=1e-2, warmup_steps=2, total_steps=12)


class Batches(RandomBatches):
    def fingerprint(self):
        return {"tokens": 1}


def train(folder, opt=OPT, train=TRAIN, on_step=None, tokenizer=None, **config):
    """A run on the CPU; `on_step` is given each step's row."""
    tell = lambda row: on_step(row) if on_step and "event" not in row else None
    config = RunConfig(**config)
    run = Run(folder, CFG, train, opt, Batches(CFG, 0), "torch", tokenizer=tokenizer, config=config, on_event=tell)
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


def parameters(*values: float) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(1)) for _ in values]
    for p, value in zip(made, values, strict=True):
        p.grad = torch.tensor([value])
    return made


def test_clip_is_exact_and_safe_at_zero():
    a, b = parameters(3.0, 4.0)
    assert optim.clip_by_global_norm([a, b], 1.0) == 5.0
    assert a.grad.item() == np.float32(3) * np.float32(0.2)
    for max_norm in (None, 10.0, 5.0):
        a, b = parameters(3.0, 4.0)
        optim.clip_by_global_norm([a, b], max_norm)
        assert b.grad.item() == 4.0
    (zero,) = parameters(0.0)
    assert optim.clip_by_global_norm([zero], 1.0) == 0
    assert zero.grad.item() == 0


def test_adamw_trains_any_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = optim.make_optimizer(OptimizerConfig(lr_max=0.1, weight_decay=0.5), module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()  # without a gradient: only decay, and only of matrices
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1.0))


def test_generating_first_does_not_spoil_training():
    trainer = Trainer(CFG, TRAIN, OPT)
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


def test_clip_without_gradients_is_norm_zero():
    assert optim.clip_by_global_norm([torch.nn.Parameter(torch.ones(1))], 1.0) == 0


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
    trainer = Trainer(CFG, TrainConfig(batch_size=3, seq_len=13, compute_dtype="bfloat16"), OPT)
    trainer.fit(Batches(CFG, 0, n=1), on_step=lambda step, t, m: losses.append(m["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_skips_stop_the_run_with_a_diagnosis():
    trainer = Trainer(CFG, TRAIN, OPT)
    torch.nn.init.constant_(trainer.model.model.norm.weight, torch.inf)
    steps = []
    hook = lambda step, t, m: steps.append((step, m["skipped"], t.optimizer.count))
    with pytest.raises(UserError, match="not finite in 10 steps in a row"):
        trainer.fit(Batches(CFG, 0), on_step=hook)
    assert steps == [(n, True, 0) for n in range(1, 11)]


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
    with pytest.raises(UserError, match="data.tokenizer = "):
        train(tmp_path, tokenizer=Tokenizer([(b"a", b"b")]))


@pytest.mark.parametrize(("part", "token"), [(0, 96), (1, -1), (1, 96)])
def test_token_ids_out_of_range_stop_training(part, token):
    data = Batches(CFG, 0)
    data.batches[0][part][0, 0] = token
    with pytest.raises(UserError, match=f"step 0, (inputs|targets): token id {token} is outside"):
        Trainer(CFG, TRAIN, OPT).fit(data)


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    train(tmp_path)
    other = OptimizerConfig(lr_max=2e-2, warmup_steps=2, total_steps=12)
    with pytest.raises(UserError, match="optimizer.lr_max = 0.01 here, 0.02 asked for"):
        train(tmp_path, other)


def test_bad_settings_are_refused_before_work():
    with pytest.raises(UserError, match="seq_len needs 65 positions"):
        Trainer(CFG, TrainConfig(seq_len=65), OPT)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch cannot use device 'cuda' here.*present: cpu"):
            select_device("gpu")
    with pytest.raises(UserError, match="torch cannot use device 'abacus'"):
        select_device("abacus")
