"""A run started in one framework goes on in the other: in float64, alternating changes nothing."""

import numpy as np
import pytest

import jax_llm.run
import torch_llm.run
from llm_common.checkpoint import load_checkpoint
from llm_common.config import OptimizerConfig, RunConfig, TrainConfig, preset
from llm_common.data import TokenDataset
from llm_common.errors import UserError
from llm_common.run import Run
from llm_common.tokenizer import Tokenizer
from parity.compare import tensor_errors

CFG = preset("tiny")
OPT = OptimizerConfig(lr_max=1e-3, warmup_steps=3, total_steps=30)
SIDES = {"jax": jax_llm.run, "torch": torch_llm.run}


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
    return SIDES[side].fit_and_save(Run(run, CFG, config, OPT, data, side, config=saves, on_event=on_event), "cpu")


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
            Run(tmp_path / "run", other, TrainConfig(batch_size=4, seq_len=12), OPT, data, side), "cpu"
        )


@pytest.mark.parametrize("side", SIDES)
def test_the_tokenizer_travels_with_the_checkpoint(side, data, tmp_path):
    config, opt = TrainConfig(batch_size=4, seq_len=12), OptimizerConfig(total_steps=1)
    run = Run(tmp_path / "run", CFG, config, opt, data, side, tokenizer=Tokenizer([]))
    folder = SIDES[side].fit_and_save(run, "cpu")
    assert Tokenizer.load(folder / "bpe.json").vocab_size == 257
