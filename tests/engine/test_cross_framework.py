"""A run started in one framework goes on in the other: in float64, alternating changes nothing."""

import numpy as np
import pytest

import jax_llm.engine.run
import torch_llm.engine.run
from llm_common.config import OptimizerConfig, Recipe, RunConfig, TrainConfig, preset
from llm_common.data.datasets import TokenDataset
from llm_common.errors import UserError
from llm_common.run.checkpoint import load_checkpoint
from llm_common.run.folder import Run
from llm_common.run.log import read_log
from llm_common.text.tokenizer import Tokenizer
from parity.core.compare import tensor_errors

CFG = preset("tiny")
OPT = OptimizerConfig(lr_max=1e-3, warmup_steps=3, total_steps=30)
SIDES = {"jax": jax_llm.engine.run, "torch": torch_llm.engine.run}


@pytest.fixture
def data(tmp_path):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, 2000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    return TokenDataset(tmp_path / "tokens.npy", 12, 4, 0, CFG.vocab_size)


class Stop(Exception):
    pass


def train(side: str, run, data, dtype: str, until: int):
    """Train with a checkpoint every 5 steps and be interrupted after step `until`."""

    def on_event(row):
        if "event" not in row and row["step"] > until:
            raise Stop

    config = TrainConfig(batch_size=4, seq_len=12, compute_dtype=dtype)
    saves = RunConfig(save_every=5, keep_last=0)
    return SIDES[side].fit_and_save(
        Run(run, Recipe(CFG, config, OPT), data, side, config=saves, on_event=on_event), "cpu"
    )


@pytest.mark.parametrize(("dtype", "allowed"), [("float64", 1e-10), ("float32", 1e-3)])
def test_alternating_frameworks_is_the_straight_run(dtype, allowed, data, tmp_path):
    straight = {side: train(side, tmp_path / side, data, dtype, 30) for side in SIDES}
    for side, until in (("jax", 5), ("torch", 15), ("jax", 25)):
        with pytest.raises(Stop):
            train(side, tmp_path / "mixed", data, dtype, until)
    mixed = train("torch", tmp_path / "mixed", data, dtype, 30)
    states = [load_checkpoint(folder)[1] for folder in (straight["jax"], straight["torch"], mixed)]
    for state in states[1:]:
        assert (state.step, state.adam_count) == (30, 30)
        for part in ("weights", "mu", "nu"):
            errors = tensor_errors(getattr(state, part), getattr(states[0], part))
            assert max(errors.values()) < allowed, (part, errors)


@pytest.mark.parametrize("side", SIDES)
def test_a_checkpoint_of_another_model_is_refused(side, data, tmp_path):
    import dataclasses

    train("jax", tmp_path / "run", data, "float32", 30)
    other = dataclasses.replace(CFG, num_hidden_layers=3)
    with pytest.raises(UserError, match="another model: num_hidden_layers = 2 here, 3 asked for"):
        SIDES[side].fit_and_save(
            Run(tmp_path / "run", Recipe(other, TrainConfig(batch_size=4, seq_len=12), OPT), data, side), "cpu"
        )


@pytest.mark.parametrize("side", SIDES)
def test_the_tokenizer_travels_with_the_checkpoint(side, data, tmp_path):
    config, opt = TrainConfig(batch_size=4, seq_len=12), OptimizerConfig(total_steps=1)
    run = Run(tmp_path / "run", Recipe(CFG, config, opt), data, side, tokenizer=Tokenizer([]))
    folder = SIDES[side].fit_and_save(run, "cpu")
    assert Tokenizer.load(folder / "bpe.json").vocab_size == 257


def alternate(tmp_path, data, dtype: str, steps: int, every: int):
    """A run that changes frameworks every so many steps; returns its folder and the losses."""
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=steps // 10, total_steps=steps)
    train = TrainConfig(batch_size=4, seq_len=12, compute_dtype=dtype)

    def run(name: str, side: str, until: int):
        def on_event(row):
            if row.get("step") == until - 1 and "event" not in row:  # a row is written when the next step has begun
                training.stop_signal = 15

        folder = tmp_path / name
        training = Run(folder, Recipe(CFG, train, opt), data, side, config=RunConfig(keep_last=0), on_event=on_event)
        return SIDES[side].fit_and_save(training, "cpu")

    ends = {side: run(side, side, steps) for side in SIDES}
    for i in range(0, steps, every):
        ends["mixed"] = run("mixed", ("jax", "torch")[i // every % 2], i + every)
    losses = {}
    for name in ends:
        rows = [row for row in read_log(tmp_path / name / "log.jsonl") if "event" not in row]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        losses[name] = np.array([row["loss"] for row in rows])
    assert [row["framework"] for row in rows] == [("jax", "torch")[i // every % 2] for i in range(steps)]
    return {name: load_checkpoint(folder)[1] for name, folder in ends.items()}, losses


@pytest.mark.slow
def test_400_steps_switching_every_50_in_float64(data, tmp_path):
    """Within the rule for free-running trajectories: 1e-11, or ten times what one ulp within one framework does."""
    states, _ = alternate(tmp_path, data, "float64", 400, 50)
    largest = lambda a, b: max(float(np.abs(a.weights[n] - b.weights[n]).max()) for n in a.weights)
    assert largest(states["mixed"], states["jax"]) < 1e-11
    assert largest(states["mixed"], states["torch"]) < 1e-11


@pytest.mark.slow
def test_no_seam_in_bfloat16(data, tmp_path):
    """Where the frameworks change the loss jumps no more than elsewhere, against the straight run of one framework."""
    _, losses = alternate(tmp_path, data, "bfloat16", 200, 25)
    difference = losses["mixed"] - losses["jax"]
    noise = losses["torch"] - losses["jax"]
    assert np.sqrt(np.mean(difference**2)) < 3 * np.sqrt(np.mean(noise**2)) + 1e-4
    jumps = np.abs(np.diff(difference))
    seams = jumps[24::25]
    assert seams.max() <= 1.5 * np.delete(jumps, np.s_[24::25]).max()
