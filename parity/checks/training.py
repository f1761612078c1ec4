"""Checks of training: AdamW steps, the library's own AdamW beside ours, and trajectories of a thousand steps."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from llm_common.config import OptimizerConfig
from llm_common.errors import UserError, counted
from llm_common.run.checkpoint import TrainingState
from parity import spec, spec_run
from parity.core.compare import (
    EPS,
    JAX,
    TORCH,
    Row,
    Tensors,
    global_norm,
    round_to,
    tensor_errors,
    three_way,
    verdict,
    worst,
)
from parity.core.inputs import RandomBatches, random_weights, start_state
from parity.sides.settings import Settings
from parity.trace.trace import located, located_or

# Error of the update p_n - p_0 in float64. An element whose gradient is near eps = 1e-8 turns a rounding error of 1e-17
# into 1e-9 of its own update, and there are few such: measured 1e-15 to 6e-13. A wrong beta, decay or correction shows
# above 1e-6.
UPDATE_ALLOWED = 1e-10
# Moments have no such amplification: measured 6e-15. They, not the update, whose direction hardly depends on the scale
# of the gradient, see the smallest planted bug: torch's clip epsilon of 1e-6 changes a gradient of norm 100 by 1e-8.
MOMENTS_ALLOWED = 1e-12
# Free-running float64: 10 x what one ulp in one weight does within one framework, floor 1e-11; past 1e-9 it is chaos.
DRIFT_FLOOR, DRIFT_FACTOR, CHAOTIC = 1e-11, 10.0, 1e-9
# Low precision: a multiple of the control, and a floor for runs in which nothing moves. Measured over 30 random
# configs: the difference is at most 2.0 x the control in float32 (largest difference) and 1.1 x in bfloat16 (rms).
LOSS_FACTOR = {"float32": 10.0, "bfloat16": 3.0}
LOSS_FLOOR = {"float32": 1e-5, "bfloat16": 1e-4}


def update_of(new: Tensors, old: Tensors) -> Tensors:
    return {name: x - old[name] for name, x in new.items()}


def spec_train(s: Settings, state: TrainingState, opt: OptimizerConfig, data, until_step: int, keep=()):
    """The specification's run: the last state, the states after the steps in `keep`, and (loss, norm) of every step."""
    values, kept = (state.weights, state.mu, state.nu, state.step, state.adam_count), {}
    curve = []
    while values[3] < until_step:
        ids, targets = data.batch(values[3])
        values, loss, norm = spec_run.train_step(*values, ids, targets, s.cfg, opt)
        curve.append((loss, norm))
        if values[3] in keep:
            kept[values[3]] = TrainingState(*values)
    return TrainingState(*values), kept, curve


def clipping_config(s: Settings, data: RandomBatches, weights: Tensors, **changes) -> OptimizerConfig:
    """Warmup 0 and a clip that is active: max_norm is half of the first gradient norm."""
    ids, targets = data.batch(0)
    _, grads = spec.loss_and_grads(weights, ids, targets, s.cfg)
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, total_steps=1000, max_grad_norm=global_norm(grads) / 2)
    return dataclasses.replace(opt, **changes)


def check_adamw(s: Settings) -> Iterator[Row]:
    """Whole training steps from a common start in float64; given gradients in float32."""
    if "float64" in s.dtypes:
        yield from _float64_steps(s)
    if "float32" in s.dtypes:
        yield from _float32_updates(s)


def _float64_steps(s: Settings) -> Iterator[Row]:
    data, weights = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length), random_weights(s.cfg, s.seed)
    sides = s.sides("float64")
    opt = clipping_config(s, data, weights)
    kept: list[dict[int, TrainingState]] = []
    norms: list[dict[str, np.ndarray]] = []
    for side in sides:
        states: dict[int, TrainingState] = {}
        norms.append({})

        def keep(step, state, metrics, states=states, norms=norms[-1]):
            if step in s.updates:
                states[step] = state()
            if step <= 3:
                norms[f"step {step}"] = np.array(metrics["grad_norm"])

        side.train(start_state(weights), opt, data, s.updates[-1], keep)
        kept.append(states)
    _, states, norm_curve = spec_train(s, start_state(weights), opt, data, s.updates[-1], s.updates)
    kept.append(states)
    norms.append({f"step {i + 1}": np.array(norm) for i, (_, norm) in enumerate(norm_curve[:3])})
    yield located(three_way("adamw", "gradient norms of 3 steps", "float64", norms, MOMENTS_ALLOWED), s)
    noise = None
    if s.noise and 3 in s.updates:
        noise = max(_update_noise(side, weights, opt, data, kept[k][3]) for k, side in enumerate(sides))
    for n in s.updates:
        updates = [update_of(states[n].weights, weights) for states in kept]
        norm = global_norm(updates[0])
        row = three_way("adamw", f"update after {counted(n, 'step')}, clip active", "float64", updates, UPDATE_ALLOWED)
        row = dataclasses.replace(row, noise=noise)
        if not norm > 0:
            row = dataclasses.replace(row, ok=False, side=JAX, note="the update is zero")
        yield located(row, s)
    moments = [
        {f"mu.{k}": x for k, x in states[3].mu.items()} | {f"nu.{k}": x for k, x in states[3].nu.items()}
        for states in kept
    ]
    yield located(three_way("adamw", "moments after 3 steps", "float64", moments, MOMENTS_ALLOWED), s)

    # the norm stays below max_norm: the gradients are not scaled up to it
    loose = dataclasses.replace(opt, max_grad_norm=2 * norm_curve[0][1])
    ends = [side.train(start_state(weights), loose, data, 1) for side in sides]
    ends.append(spec_train(s, start_state(weights), loose, data, 1)[0])
    row = three_way("adamw", "moments, clip not active", "float64", [end.mu for end in ends], MOMENTS_ALLOWED)
    yield located_or(row, s, None, "clip")

    yield _clipped(s)

    # a short schedule from warmup past its end, and no clipping
    opt = clipping_config(s, data, weights, warmup_steps=3, total_steps=7, max_grad_norm=None)
    ends = [side.train(start_state(weights), opt, data, 9) for side in sides]
    ends.append(spec_train(s, start_state(weights), opt, data, 9)[0])
    updates = [update_of(end.weights, weights) for end in ends]
    row = three_way("adamw", "warmup 3, cosine to 7, 9 steps", "float64", updates, UPDATE_ALLOWED)
    yield located_or(row, s, None, "learning_rate")

    # an infinite weight: the norm is not finite, the update is skipped, the step counts
    broken = {name: x.copy() for name, x in weights.items()}
    broken["model.layers.0.mlp.down_proj.weight"][0, 0] = np.inf
    bad = []
    for side in sides:
        end = side.train(start_state(broken), opt, data, 2)
        same = all(np.array_equal(end.weights[k], x) for k, x in broken.items())
        still = not any(x.any() for x in (*end.mu.values(), *end.nu.values()))
        bad.append(not (same and still and end.step == 2 and end.adam_count == 0))
    side = verdict(*bad, alike=True)
    place = "train_step (skipped update)" if side else ""
    yield Row("adamw", "a non-finite gradient skips the update", "float64", sum(bad), 0, not side, side, place=place)


# The norm of a gradient, and its limit, both below 1: reached and not. Above 1 a limit is reached in other rows.
CLIPS = ((0.3, 0.1), (0.3, 0.5))


def _clipped(s: Settings) -> Row:
    """The first moments that gradients leave with beta1 = 0: the clipped gradients themselves."""
    cfg = dataclasses.replace(s.cfg, num_hidden_layers=1)
    data, weights = RandomBatches(cfg, s.seed, batch=1, length=min(4, s.length)), random_weights(cfg, s.seed)
    ids, targets = data.batch(0)
    _, grads = spec.loss_and_grads(weights, ids, targets, cfg)
    size = global_norm(grads)
    results: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for norm, limit in CLIPS:
        scaled = {name: g * (norm / size) for name, g in grads.items()}
        clipped, _ = spec.clip(scaled, limit)
        results[2] |= {f"norm {norm:g}, limit {limit:g}: {name}": g for name, g in clipped.items()}
        opt = OptimizerConfig(beta1=0.0, max_grad_norm=limit)
        for found, side in zip(results, s.sides("float64", cfg), strict=False):
            with side.given_gradients(1.0, scaled):
                mu = side.train(start_state(weights), opt, data, 1).mu
            found |= {f"norm {norm:g}, limit {limit:g}: {name}": x for name, x in mu.items()}
    # each by itself: among others it would be measured against their norm
    rows = [
        three_way("adamw", "", "float64", [{name: x[name]} for x in results], MOMENTS_ALLOWED) for name in results[2]
    ]
    row = max(rows, key=lambda row: (not row.ok, row.measured))
    item = f"moments of gradients of {len(CLIPS)} norms, clipped or not"
    return dataclasses.replace(row, item=item, place="" if row.ok else "clip")


def _update_noise(side, weights: Tensors, opt: OptimizerConfig, data: RandomBatches, end: TrainingState) -> float:
    """How far three updates move within one framework when the sequences of each batch come in reverse order."""

    class Reversed:
        def batch(self, step, host=0, n_hosts=1):
            return tuple(x[::-1].copy() for x in data.batch(step))

    other = side.train(start_state(weights), opt, Reversed(), 3)
    return worst(tensor_errors(update_of(other.weights, weights), update_of(end.weights, weights)))[1]


def _float32_updates(s: Settings) -> Iterator[Row]:
    """AdamW alone from the same gradients: ||p - p64|| <= u (t ||p64|| + 8 sum ||lr update||) for every tensor.

    Each of t steps rounds p once (u ||p||), and an update is some eight operations, each with a relative rounding u.
    """
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, total_steps=1000, max_grad_norm=None)
    weights, grads = _given_gradients(s, "float32", 100)
    exact, travelled = _spec_adamw(weights, grads, opt, (100,))
    results = [side.adamw(weights, grads, opt, (100,), library=False) for side in s.sides("float32")]
    shares = []
    for result in results:
        share = {}
        for name, p64 in exact[100].items():
            bound = EPS["float32"] / 2 * (100 * np.linalg.norm(p64) + 8 * travelled[name])
            share[name] = float(np.linalg.norm(result[100][name] - p64) / bound)
        shares.append(worst(share))
    (jax_name, jax_share), (torch_name, torch_share) = shares
    side = verdict(not jax_share <= 1, not torch_share <= 1, True)
    name = jax_name if jax_share >= torch_share else torch_name
    yield Row(
        "adamw",
        "100 given gradients, share of the bound",
        "float32",
        max(jax_share, torch_share),
        1.0,
        not side,
        side,
        name,
    )


def _given_gradients(s: Settings, dtype: str, n: int) -> tuple[Tensors, list[Tensors]]:
    weights = random_weights(s.cfg, s.seed, dtype)
    rng = np.random.default_rng((s.seed, 5))
    signal = {name: rng.standard_normal(x.shape) for name, x in weights.items()}
    grads = []
    for _ in range(n):
        g = {name: 0.05 * (signal[name] + rng.standard_normal(x.shape)) for name, x in weights.items()}
        grads.append({name: x.astype(np.float32).astype(np.float64) for name, x in g.items()})
    return weights, grads


def _spec_adamw(
    weights: Tensors, grads: list[Tensors], opt: OptimizerConfig, keep: tuple[int, ...]
) -> tuple[dict[int, Tensors], dict[str, float]]:
    """The specification's weights after the updates in `keep`, and for every tensor the length of its path, sum ||lr
    update||.
    """
    state = start_state(weights)
    w, mu, nu, kept = state.weights, state.mu, state.nu, {}
    travelled = dict.fromkeys(weights, 0.0)
    for n, g in enumerate(grads, start=1):
        new, mu, nu = spec.adamw_step(w, mu, nu, g, opt, opt.lr_max, n)
        for name in travelled:
            travelled[name] += float(np.linalg.norm(new[name] - w[name]))
        w = new
        if n in keep:
            kept[n] = w
    return kept, travelled


def check_library(s: Settings) -> Iterator[Row]:
    """`optax.adamw` and `torch.optim.AdamW`, whose formula is the same, beside the specification: same gradients."""
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, total_steps=1000, max_grad_norm=None)
    for dtype in [d for d in ("float64", "float32") if d in s.dtypes]:
        weights, grads = _given_gradients(s, dtype, s.updates[-1])
        exact, travelled = _spec_adamw(weights, grads, opt, s.updates)
        # float32: torch keeps 1 - lr * decay rounded, a relative error of u / 2 in p at every step, on top of rounding
        # p twice a step; relative to the path that is far larger than for our own form, and proportional to t.
        for side, library in zip(s.sides(dtype), ("optax.adamw", "torch.optim.AdamW"), strict=True):
            results = side.adamw(weights, grads, opt, s.updates, library=True)
            for n in s.updates:
                if dtype == "float64":
                    name, error = worst(tensor_errors(update_of(results[n], weights), update_of(exact[n], weights)))
                    allowed = UPDATE_ALLOWED
                elif n == s.updates[-1]:
                    share = {}
                    for key, p64 in exact[n].items():
                        bound = EPS[dtype] / 2 * (3 * n * np.linalg.norm(p64) + 8 * travelled[key])
                        share[key] = float(np.linalg.norm(results[n][key] - p64) / bound)
                    (name, error), allowed = worst(share), 1.0
                else:
                    continue
                ok = error <= allowed
                what = "update" if dtype == "float64" else "share of the bound"
                yield Row(
                    "library", f"{library}, {what} after {n}", dtype, error, allowed, ok, "" if ok else side.name, name
                )


def initial_weights(s: Settings) -> Tensors:
    """The start of a training run, as the specification makes it."""
    return spec.initial_weights(s.seed, s.cfg)


def check_trajectory(s: Settings) -> Iterator[Row]:
    """A thousand steps: single steps from common states, and both sides running free."""
    if "float64" in s.dtypes:
        yield from _float64_trajectory(s)
    for dtype in [d for d in ("float32", "bfloat16") if d in s.dtypes]:
        yield from _low_precision_trajectory(s, dtype)


def _float64_trajectory(s: Settings) -> Iterator[Row]:
    data, weights = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length), initial_weights(s)
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=min(100, s.steps // 10), total_steps=s.steps)
    sides = s.sides("float64")
    checkpoints: dict[int, TrainingState] = {0: start_state(weights)}

    def keep(step, state, metrics):
        if step % 25 == 0 and step < s.steps:
            checkpoints[step] = state()

    free = [sides[0].train(start_state(weights), opt, data, s.steps, keep)]
    free.append(sides[1].train(start_state(weights), opt, data, s.steps))
    nudged = start_state(weights)
    first = nudged.weights["model.layers.0.self_attn.q_proj.weight"]
    first[0, 0] = np.nextafter(first[0, 0], np.inf)
    control = sides[0].train(nudged, opt, data, s.steps)

    # (a) one step of each from the same state, which is JAX's own at every 25th step
    rows = []
    for step, state in checkpoints.items():
        if spec_run.learning_rate(opt, step) == 0.0:  # the first step of a warmup moves nothing
            continue
        ends = [side.train(state, opt, data, step + 1).weights for side in sides]
        ends.append(spec_train(s, state, opt, data, step + 1)[0].weights)
        updates = [update_of(end, state.weights) for end in ends]
        rows.append(three_way("trajectory", "", "float64", updates, UPDATE_ALLOWED, f"step {step}"))
    bad = [row for row in rows if not row.ok]
    row = max(bad or rows, key=lambda row: row.measured)
    yield dataclasses.replace(row, item=f"one step from a common state, {len(rows)} states")

    # (b) running free
    free.append(spec_train(s, start_state(weights), opt, data, s.steps)[0])
    drift = [_max_difference(a, b) for a, b in ((free[0], free[2]), (free[1], free[2]), (free[0], free[1]))]
    noise = _max_difference(free[0], control)
    allowed = max(DRIFT_FLOOR, DRIFT_FACTOR * noise)
    item, note = f"max |dp| after {s.steps} free steps", f"one ulp in one weight makes {noise:.1e}"
    if noise > CHAOTIC:
        yield Row(
            "trajectory", item, "float64", max(drift), math.inf, True, "", note + ": chaotic, not judged", "", noise
        )
        return
    side = verdict(not drift[0] <= allowed, not drift[1] <= allowed, drift[2] <= allowed)
    yield Row("trajectory", item, "float64", max(drift), allowed, not side, side, note, noise=noise)


def _max_difference(a: TrainingState, b: TrainingState) -> float:
    return max(float(np.abs(a.weights[name] - b.weights[name]).max()) for name in a.weights)


def _low_precision_trajectory(s: Settings, dtype: str) -> Iterator[Row]:
    """Loss curves of both sides, against what the smallest change within one framework does to its own curve.

    float32: the largest difference, bfloat16: the rms difference over the run, because a single step would be noise.
    The control is JAX again with one ulp in every tenth weight, the largest of three such runs.
    """
    steps = min(s.steps, 300 if dtype == "float32" else 200)
    data = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length)
    weights = {name: round_to(x, "float32") for name, x in initial_weights(s).items()}
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=steps // 10, total_steps=steps)
    rng = np.random.default_rng((s.seed, 6))

    def losses(side, weights) -> np.ndarray:
        curve: list[float] = []
        try:
            side.train(
                start_state(weights), opt, data, steps, lambda step, state, metrics: curve.append(metrics["loss"])
            )
        except UserError:  # too many skipped steps: a curve of NaN, which no band holds
            curve += [math.nan] * (steps - len(curve))
        return np.array(curve)

    def nudged() -> Tensors:
        return {
            name: x * (1 + EPS[dtype] * (rng.random(x.shape) < 0.1) * rng.choice([-1, 1], x.shape))
            for name, x in weights.items()
        }

    jax_side, torch_side = s.sides(dtype)
    jax, torch = losses(jax_side, weights), losses(torch_side, weights)
    exact = np.array([loss for loss, _ in spec_train(s, start_state(weights), opt, data, steps)[2]])
    controls = [losses(jax_side, nudged()) for _ in range(3)]
    if dtype == "float32":
        noise = max(float(np.abs(control - jax).max()) for control in controls)
        distance = lambda a, b: float(np.abs(a - b).max())
        item = f"largest loss difference in {steps} steps"
    else:
        noise = max(_rms(control - jax) for control in controls)
        distance = lambda a, b: _rms(a - b)
        item = f"rms loss difference over {steps} steps"
    allowed = max(LOSS_FLOOR[dtype], LOSS_FACTOR[dtype] * noise)
    pair, errors = distance(jax, torch), (distance(jax, exact), distance(torch, exact))
    if not pair <= allowed:
        side = TORCH if not errors[1] <= errors[0] else JAX
    else:  # they agree; an error that both share shows against the specification, beyond what low precision explains
        band = 10 * allowed
        side = verdict(not errors[0] <= band, not errors[1] <= band, True)
    yield Row("trajectory", item, dtype, pair, allowed, not side, side, f"within JAX: {noise:.1e}", noise=noise)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))
