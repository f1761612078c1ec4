"""Where two optimizers part: one whole step of each side from a common state and given gradients, quantity by quantity."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from llm_common.checkpoint import TrainingState
from llm_common.config import ModelConfig, OptimizerConfig
from parity import spec, spec_run
from parity.cases import random_batch, random_weights
from parity.compare import global_norm, tensor_errors
from parity.points import Fault
from parity.settings import Settings


@dataclasses.dataclass(frozen=True)
class OptimizerTrace:
    """The errors of one side's optimizer step from a common state and given gradients, tensor by tensor."""

    side: str
    norm: float
    mu: dict[str, float]
    nu: dict[str, float]
    update: dict[str, float]


def trace_optimizers(s: Settings, cfg: ModelConfig) -> Iterator[OptimizerTrace]:
    """One whole training step of each side, in float64, from a state in the middle of a run; the gradients are given.

    They are put where the step computes them, so that clip, schedule, corrections and update are those a run has.
    """
    weights = random_weights(cfg, s.seed)
    ids, targets = random_batch(cfg, s.seed, s.batch, s.length)
    loss, grads = spec.loss_and_grads(weights, ids, targets, cfg)
    rng = np.random.default_rng((s.seed, 8))
    mu = {name: 0.3 * rng.standard_normal(g.shape) * np.abs(g).mean() for name, g in grads.items()}
    nu = {name: rng.random(g.shape) * np.square(g).mean() for name, g in grads.items()}
    state = TrainingState({name: x.copy() for name, x in weights.items()}, mu, nu, 3, 2)
    norm = global_norm(grads)
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=2, total_steps=9, max_grad_norm=norm / 2)
    clipped, _ = spec.clip(grads, opt.max_grad_norm)
    new, new_mu, new_nu = spec.adamw_step(weights, mu, nu, clipped, opt, spec_run.learning_rate(opt, 3), 3)
    update_of = lambda after: {name: x - weights[name] for name, x in after.items()}

    in_order = lambda errors: {name: errors[name] for name in weights}

    class Data:
        def batch(self, step, host=0, n_hosts=1):
            return ids.astype(np.int32), targets.astype(np.int32)

    for side in s.sides("float64", cfg):
        metrics: dict[str, float] = {}
        with side.given_gradients(loss, grads):
            end = side.train(state, opt, Data(), 4, lambda step, state, m, metrics=metrics: metrics.update(m))
        yield OptimizerTrace(
            side.name,
            abs(metrics["grad_norm"] - norm) / norm,
            in_order(tensor_errors(end.mu, new_mu)),
            in_order(tensor_errors(end.nu, new_nu)),
            in_order(tensor_errors(update_of(end.weights), update_of(new))),
        )


OPTIMIZER_ALLOWED = {"norm": 1e-12, "mu": 1e-12, "nu": 1e-12, "update": 1e-10}


def optimizer_fault(t: OptimizerTrace) -> Fault | None:
    """The first wrong quantity in the order norm, moments, update, and in which tensor."""
    if not t.norm <= OPTIMIZER_ALLOWED["norm"]:
        return Fault("optimizer: gradient norm", "given identical gradients", t.norm)
    for what in ("mu", "nu", "update"):
        errors = getattr(t, what)
        bad = [name for name, error in errors.items() if not error <= OPTIMIZER_ALLOWED[what]]
        if len(bad) == len(errors):
            return Fault(f"optimizer: {what}", "in every tensor, given identical gradients", errors[bad[0]])
        if bad:
            some = f"in {len(bad)} of {len(errors)} tensors, given identical gradients"
            return Fault(f"optimizer: {what} of {bad[0]}", some, errors[bad[0]])
    return None
