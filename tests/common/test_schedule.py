"""Learning rate and bias corrections at the points where schedules go wrong."""

import math

import pytest

from llm_common.config import OptimizerConfig
from llm_common.schedule import bias_corrections, learning_rate, step_scalars

CFG = OptimizerConfig(lr_max=1.0, lr_min=0.1, warmup_steps=4, total_steps=12)


@pytest.mark.parametrize(
    ("step", "lr"), [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (8, 0.55), (12, 0.1), (13, 0.1), (10**6, 0.1)]
)
def test_learning_rate(step, lr):
    assert learning_rate(CFG, step) == pytest.approx(lr, rel=1e-15)


def test_the_last_step_of_the_cosine_is_not_yet_lr_min():
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 7 / 8)) / 2
    assert learning_rate(CFG, 11) == pytest.approx(expected, rel=1e-15)
    assert learning_rate(CFG, 11) > 0.1


def test_no_warmup_starts_at_lr_max():
    assert learning_rate(OptimizerConfig(lr_max=1.0, lr_min=0.0, total_steps=2), 0) == 1.0


def test_bias_corrections_count_updates_from_one():
    assert bias_corrections(0.9, 0.95, 1) == pytest.approx((0.1, 0.05), rel=1e-12)
    assert step_scalars(CFG, 7, 3)[1:] == bias_corrections(0.9, 0.95, 4)  # 7 steps made, of which 4 were skipped
