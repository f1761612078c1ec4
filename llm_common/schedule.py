"""The scalars of one optimizer step, as float64 functions of integers, shared by both frameworks.

They enter each side's step as numbers and are cast last: optax's schedules give float32 even with x64 on, and torch's
cosine climbs again after its last step.
"""

import math
from typing import NamedTuple

from llm_common.checks import is_finite
from llm_common.config import OptimizerConfig
from llm_common.errors import UserError


class StepScalars(NamedTuple):
    """What AdamW needs to know beside the gradients; all float64."""

    lr: float
    bias_correction1: float  # 1 - beta1^n
    bias_correction2: float  # 1 - beta2^n


def learning_rate(cfg: OptimizerConfig, step: int) -> float:
    """Linear warmup from 0 to lr_max, cosine to lr_min at total_steps, then lr_min. The first step is 0."""
    if step < cfg.warmup_steps:
        return cfg.lr_max * step / cfg.warmup_steps
    if step >= cfg.total_steps:
        return cfg.lr_min
    progress = (step - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps)
    return cfg.lr_min + 0.5 * (1.0 + math.cos(math.pi * progress)) * (cfg.lr_max - cfg.lr_min)


def bias_corrections(beta1: float, beta2: float, n: int) -> tuple[float, float]:
    """1 - beta1^n and 1 - beta2^n for the n-th update, n = 1, 2, ... (Kingma and Ba 2015, algorithm 1)."""
    return 1.0 - beta1**n, 1.0 - beta2**n


def check_adamw(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise UserError for settings with which AdamW would move weights the wrong way, or nowhere."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise UserError(f"betas = {betas!r}: two numbers are needed")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not is_finite(value) or value < 0:
            raise UserError(f"{name} = {value!r}: must be a finite number of at least 0")
    for beta in betas:
        if not is_finite(beta) or not 0 <= beta < 1:
            raise UserError(f"betas = {betas!r}: both must lie in [0, 1)")


def step_scalars(cfg: OptimizerConfig, step: int, adam_count: int) -> StepScalars:
    """The scalars of step `step` when `adam_count` updates were made before it (fewer than `step` after a skip)."""
    return StepScalars(learning_rate(cfg, step), *bias_corrections(cfg.beta1, cfg.beta2, adam_count + 1))
