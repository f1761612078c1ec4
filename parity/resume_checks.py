"""Checks of what lies between the parts: batches out of a token file, and checkpoints that one side writes and the other reads."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llm_common.checkpoint import load_checkpoint, save_checkpoint
from llm_common.config import OptimizerConfig
from llm_common.data import TokenDataset
from parity.cases import RandomBatches, random_weights, start_state
from parity.compare import SHARED, Row, three_way
from parity.settings import Settings
from parity.training_checks import UPDATE_ALLOWED, spec_train, update_of


def check_data(s: Settings) -> Iterator[Row]:
    """Batches of a small token file: consecutive tokens, targets one to the right, every window once an epoch."""
    tokens = np.arange(1, 2 + 7 * s.length + s.length // 2, dtype=np.int32)  # 7 windows and a rest
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens)
        dataset = TokenDataset(Path(folder) / "tokens.npy", s.length, 2, s.seed)
        batches = [dataset.batch(step) for step in range(7)]  # two epochs
    inputs, targets = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
    wrong = int((targets != inputs + 1).sum() + (inputs[:, 1:] != inputs[:, :-1] + 1).sum())
    for epoch in (inputs[:7], inputs[7:]):
        wrong += int((np.sort(epoch[:, 0]) != 1 + s.length * np.arange(7)).sum())
    yield Row("data", "tokens out of place in two epochs", "", wrong, 0, not wrong, SHARED if wrong else "")


def check_resume(s: Settings) -> Iterator[Row]:
    """Three steps in one framework, a checkpoint on disk, three more in the other, against six of the specification."""
    if "float64" not in s.dtypes:
        return
    data, weights = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length), random_weights(s.cfg, s.seed)
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=2, total_steps=6, max_grad_norm=1.0)
    expected = spec_train(s, start_state(weights), opt, data, 6)[0]
    ends = []
    for first, second in (s.sides("float64"), s.sides("float64")[::-1]):
        half = first.train(start_state(weights), opt, data, 3)
        with tempfile.TemporaryDirectory() as folder:
            _, loaded, _ = load_checkpoint(save_checkpoint(Path(folder), s.cfg, half, {}), s.cfg)
        ends.append(second.train(loaded, opt, data, 6))
    updates = [update_of(end.weights, weights) for end in (ends[1], ends[0], expected)]
    item = "JAX goes on from torch, torch from JAX"
    yield three_way("resume", item, "float64", updates, UPDATE_ALLOWED, "the side named is the one that went on")
