"""What the report draws beside the table: errors through the layers, gradients by tensor, a short trajectory, sampled
tokens.
"""

from typing import Any

import numpy as np

from llm_common.config import OptimizerConfig, SamplingConfig
from parity import spec
from parity.checks.tokens import draw_margin
from parity.checks.training import initial_weights, spec_train
from parity.core.compare import EPS
from parity.core.inputs import RandomBatches, random_batch, random_weights, start_state
from parity.sides.settings import Settings
from parity.trace.trace import trace

STEPS = 120
DTYPES = ("float32",)  # each costs ten seconds of compiling
STREAM = ("model.embed_tokens", "model.norm", "lm_head")


def figures(s: Settings) -> dict[str, Any]:
    """Everything as plain numbers, for report.json."""
    return {"layers": layers(s), "trajectory": trajectory(s), "tokens": tokens(s)}


def layers(s: Settings) -> dict[str, Any]:
    """For each dtype: the error of the residual stream after every layer and of every gradient, running free."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        t = trace(s, dtype=dtype, optimizer=False, alone=False)
        if any(side.error for side in t.sides):
            continue  # a side that raises has no figures; the table says so
        names = [
            p.name for p in t.sides[0].points if p.name.removeprefix("model.layers.").isdigit() or p.name in STREAM
        ]
        at = [{p.name: p for p in side.points} for side in t.sides]
        found[dtype] = {
            "points": names,
            "forward": [[side[name].free for name in names] for side in at],
            "backward": [[side[name].free_arriving for name in names] for side in at],
            "gradients": {name: [side.free_grads[name] for side in t.sides] for name in t.sides[0].free_grads},
        }
    return found


def trajectory(s: Settings) -> dict[str, Any]:
    """The losses of both sides in float32 and float64 from one start, how far the weights part, and the control's."""
    data, steps = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length), min(STEPS, s.steps)
    start = {name: x.astype(np.float32).astype(np.float64) for name, x in initial_weights(s).items()}
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=steps // 10, total_steps=steps)
    keep = tuple(range(1, steps + 1, max(1, steps // 24)))
    _, kept, curve = spec_train(s, start_state(start), opt, data, steps, keep)
    result: dict[str, Any] = {"specification": [float(loss) for loss, _ in curve], "drift steps": list(keep)}
    for dtype in DTYPES:
        sides = dict(zip(("JAX", "torch"), s.sides(dtype), strict=True))
        runs = {name: _run(side, start, opt, data, steps, keep) for name, side in sides.items()}
        nudged = {
            name: x * (1 + EPS[dtype] * (np.arange(x.size).reshape(x.shape) % 10 == 0)) for name, x in start.items()
        }
        runs["control"] = _run(sides["JAX"], nudged, opt, data, steps, keep)
        exact = {n: state.weights for n, state in kept.items()}
        drift = {
            name: [_furthest(run[1][n], exact[n] if name != "control" else runs["JAX"][1][n]) for n in keep]
            for name, run in runs.items()
        }
        result[dtype] = {"losses": {name: run[0] for name, run in runs.items()}, "drift": drift}
    return result


def _furthest(a, b) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def _run(side, weights, opt, data, steps, keep):
    losses: list[float] = []
    kept: dict[int, Any] = {}

    def look(step, state, metrics):
        losses.append(metrics["loss"])
        if step in keep:
            kept[step] = {name: x.astype(np.float64) for name, x in state().weights.items()}

    side.train(start_state(weights, side.master), opt, data, steps, look)
    return losses, kept


def tokens(s: Settings) -> dict[str, Any]:
    """One sampled text of each side in float32, the specification's margin at every draw, and where they part first."""
    weights = random_weights(s.cfg, s.seed, "float32")
    prompt, sampling = (
        random_batch(s.cfg, s.seed, 1, 4, ignored=False)[0],
        SamplingConfig(top_k=12, seed=s.seed % 2**31),
    )
    n = min(24, s.cfg.max_position_embeddings - 4)
    texts = [side.generate(weights, prompt, n, sampling)[0] for side in s.sides("float32")]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    ids, margins = prompt[0].tolist(), []
    for token in texts[0]:
        logits = spec.forward(weights, np.array([ids]), s.cfg)[0][0, -1]
        margins.append(draw_margin(logits, sampling, 0, len(ids)))
        ids.append(token)
    return {"prompt": prompt[0].tolist(), "JAX": texts[0], "torch": texts[1], "equal": same, "margins": margins}
