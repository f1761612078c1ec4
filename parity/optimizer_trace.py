"""Where two optimizers part: one whole step of each side from a common state and given gradients, quantity by quantity."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_common.checkpoint import TrainingState
from llm_common.config import ModelConfig, OptimizerConfig
from parity import spec, spec_run
from parity.cases import random_batch, random_weights
from parity.compare import Tensors, global_norm, tensor_errors
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
    reading: str = ""  # what an update that is wrong would be right with


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
        found = OptimizerTrace(
            side.name,
            abs(metrics["grad_norm"] - norm) / norm,
            in_order(tensor_errors(end.mu, new_mu)),
            in_order(tensor_errors(end.nu, new_nu)),
            in_order(tensor_errors(update_of(end.weights), update_of(new))),
        )
        if max(found.mu.values()) > OPTIMIZER_ALLOWED["mu"]:
            ways = {"beta1": (mu, opt.beta1), "(1 - beta1) x clip factor": (clipped, 1.0 - opt.beta1)}
            found = dataclasses.replace(found, reading=_reading(end.mu, ways))
        elif max(found.nu.values()) > OPTIMIZER_ALLOWED["nu"]:
            squares = {name: g * g for name, g in clipped.items()}
            found = dataclasses.replace(
                found, reading=_reading(end.nu, {"beta2": (nu, opt.beta2), "1 - beta2": (squares, 1.0 - opt.beta2)})
            )
        elif max(found.update.values()) > OPTIMIZER_ALLOWED["update"]:
            lr, (one, two) = spec_run.learning_rate(opt, 3), (1.0 - b**3 for b in (opt.beta1, opt.beta2))
            direction = {k: (new_mu[k] / one) / (np.sqrt(new_nu[k] / two) + opt.eps) for k in weights}
            decayed = {k: x if x.ndim >= 2 else np.zeros_like(x) for k, x in weights.items()}
            ways = {"-lr": (direction, -lr), "-lr x decay": (decayed, -lr * opt.weight_decay)}
            found = dataclasses.replace(found, reading=_reading(update_of(end.weights), ways))
        yield found


def _reading(found: Tensors, ways: Mapping[str, tuple[Any, float]]) -> str:
    """Found tensors as a sum of others with one factor each: the factors, if such a sum it is, beside what they should be."""
    flat = lambda tensors: np.concatenate([np.ravel(tensors[name]) for name in found])
    basis, wanted = np.stack([flat(x) for x, _ in ways.values()], axis=1), flat(found)
    factors, *_ = np.linalg.lstsq(basis, wanted, rcond=None)
    if not np.linalg.norm(basis @ factors - wanted) <= 1e-8 * np.linalg.norm(wanted):
        return ""
    return ", ".join(
        f"{name} = {x:.8g} for {right:.8g}" for x, (name, (_, right)) in zip(factors, ways.items(), strict=True)
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
            as_if = f"; as if {t.reading}" if t.reading else ""
            return Fault(f"optimizer: {what}", f"in every tensor, given identical gradients{as_if}", errors[bad[0]])
        if bad:
            some = f"in {len(bad)} of {len(errors)} tensors, given identical gradients"
            return Fault(f"optimizer: {what} of {bad[0]}", some, errors[bad[0]])
    return None
