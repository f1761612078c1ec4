"""Where two optimizers part: one whole step of each side from a common state and given gradients, quantity by
quantity.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig
from llm_common.run.checkpoint import TrainingState
from parity import spec, spec_run
from parity.core.compare import Tensors, global_norm, tensor_errors
from parity.core.inputs import Always, random_batch, random_weights
from parity.sides.settings import Settings
from parity.trace.points import Fault


@dataclasses.dataclass(frozen=True)
class OptimizerTrace:
    """The errors of one side's optimizer step from a common state and given gradients, tensor by tensor."""

    side: str
    norm: float
    mu: dict[str, float]
    nu: dict[str, float]
    update: dict[str, float]
    reading: str = ""  # what an update that is wrong would be right with
    clip: bool = False  # whether another clip factor explains the moments


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

    data = Always((ids.astype(np.int32), targets.astype(np.int32)))
    for side in s.sides("float64", cfg):
        metrics: dict[str, float] = {}
        with side.given_gradients(loss, grads):
            end = side.train(state, opt, data, 4, lambda step, state, m, metrics=metrics: metrics.update(m))
        found = OptimizerTrace(
            side.name,
            abs(metrics["grad_norm"] - norm) / norm,
            in_order(tensor_errors(end.mu, new_mu)),
            in_order(tensor_errors(end.nu, new_nu)),
            in_order(tensor_errors(update_of(end.weights), update_of(new))),
        )
        squares = {name: g * g for name, g in clipped.items()}
        of_mu = {"beta1": (mu, opt.beta1), "(1 - beta1) x clip factor": (clipped, 1.0 - opt.beta1)}
        of_nu = {"beta2": (nu, opt.beta2), "1 - beta2": (squares, 1.0 - opt.beta2)}
        if max(found.mu.values()) > OPTIMIZER_ALLOWED["mu"]:
            clip = _is_a_clip(_factors(end.mu, of_mu), _factors(end.nu, of_nu), opt)
            found = dataclasses.replace(found, reading=_reading(end.mu, of_mu), clip=clip)
        elif max(found.nu.values()) > OPTIMIZER_ALLOWED["nu"]:
            found = dataclasses.replace(found, reading=_reading(end.nu, of_nu))
        elif max(found.update.values()) > OPTIMIZER_ALLOWED["update"]:
            lr, (one, two) = spec_run.learning_rate(opt, 3), (1.0 - b**3 for b in (opt.beta1, opt.beta2))
            direction = {k: (new_mu[k] / one) / (np.sqrt(new_nu[k] / two) + opt.eps) for k in weights}
            decayed = {k: x if x.ndim >= 2 else np.zeros_like(x) for k, x in weights.items()}
            ways = {"-lr": (direction, -lr), "-lr x decay": (decayed, -lr * opt.weight_decay)}
            found = dataclasses.replace(found, reading=_reading(update_of(end.weights), ways))
        yield found


def _factors(found: Tensors, ways: Mapping[str, tuple[Any, float]]) -> Sequence[float]:
    """Found tensors as a sum of others with one factor each: the factors, or none if it is no such sum."""
    flat = lambda tensors: np.concatenate([np.ravel(tensors[name]) for name in found])
    basis, wanted = np.stack([flat(x) for x, _ in ways.values()], axis=1), flat(found)
    factors, *_ = np.linalg.lstsq(basis, wanted, rcond=None)
    fits = np.linalg.norm(basis @ factors - wanted) <= 1e-8 * np.linalg.norm(wanted)
    return factors.tolist() if fits else ()


def _reading(found: Tensors, ways: Mapping[str, tuple[Any, float]]) -> str:
    """The factors beside what they should be."""
    pairs = zip(_factors(found, ways), ways.items(), strict=False)
    return ", ".join(f"{name} = {x:.8g} for {right:.8g}" for x, (name, (_, right)) in pairs)


def _is_a_clip(mu: Sequence[float], nu: Sequence[float], opt: OptimizerConfig) -> bool:
    """Whether moments are right but for one factor of the gradients, which the second moments have squared."""
    if not mu or not nu or abs(mu[0] - opt.beta1) > 1e-9 or abs(nu[0] - opt.beta2) > 1e-9:
        return False
    factor, square = mu[1] / (1.0 - opt.beta1), nu[1] / (1.0 - opt.beta2)
    return abs(square - factor**2) <= 1e-8 * square


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
            what = "clip" if t.clip else what
            return Fault(f"optimizer: {what}", f"in every tensor, given identical gradients{as_if}", errors[bad[0]])
        if bad:
            some = f"in {len(bad)} of {len(errors)} tensors, given identical gradients"
            return Fault(f"optimizer: {what} of {bad[0]}", some, errors[bad[0]])
    return None
