"""Low precision inside whole models: the dtype at every module's border, outputs that are rounded as they should be,
and sums of gradients over micro-batches.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, SamplingConfig
from parity import spec, spec_run
from parity.core.compare import Row, round_to, tensor_errors, verdict, worse_side, worst
from parity.core.generated_dtypes import noted_dtypes
from parity.core.inputs import Always, InTurn, random_batch, random_weights, start_state, untraced
from parity.core.ops import is_wide
from parity.sides.settings import Settings
from parity.trace.points import given, specification


def border_rows(s: Settings, cfg: ModelConfig, name: str, differing_allowed: float) -> Iterator[Row]:
    """Every module of a family in bfloat16, given the specification's rounded inputs: the dtype at its borders, forward
    and back, and the share of its output's elements that are not the correctly rounded ones.
    """
    dtype, rnd = "bfloat16", lambda x: round_to(x, "bfloat16")
    weights = random_weights(cfg, s.seed, dtype)
    ids, targets = random_batch(cfg, s.seed, s.batch, s.length)
    points, _, _ = specification(weights, ids, targets, cfg, rnd)
    forward, backward = given(points)
    wrong_dtypes: list[list[str]] = []
    shares: list[dict[str, float]] = []
    for side in s.sides(dtype, cfg):
        recorder, _, _ = side.tapped(weights, ids, targets, forward, backward)
        of = lambda found: [
            f"{point} ({which}): {x}"
            for (point, which), x in found.items()
            if x != ("float32" if is_wide(point, which) else dtype)
        ]
        wrong = of(recorder.dtypes) + [f"{x}, on the way back" for x in of(recorder.back_dtypes)]
        for decoding, start, _ in side.tapped_cache(weights, ids[:, :4], 1, lambda start, end: {}):
            wrong += [f"{x}, decoding from position {start}" for x in of(decoding.dtypes)]
        wrong_dtypes.append(wrong)
        shares.append({})
        for p in points:
            # a fused attention rounds in other places, each kernel in its own: the check of the kernels bounds it
            fused = s.attention != "reference" and p.name.endswith(".attention")
            if p.name != "loss" and not fused and not any(q.name.startswith(p.name + ".") for q in points):
                found, output = recorder.forward.get((p.name, "out")), p.output
                if p.name.endswith("norm"):  # normalised, rounded, and then times the gain
                    ones = np.ones(p.output.shape[-1])
                    output = rnd(rnd(spec.rms_norm(p.inputs[0], ones, cfg.rms_norm_eps)) * weights[p.name + ".weight"])
                least = 2 / p.output.size  # a single element is no share
                differs = math.inf if found is None or found.shape != output.shape else float((found != output).mean())
                shares[-1][p.name] = max(0.0, differs - least)
    side = verdict(bool(wrong_dtypes[0]), bool(wrong_dtypes[1]), wrong_dtypes[0] == wrong_dtypes[1])
    first = next((x for wrong in wrong_dtypes for x in wrong), "")
    item = f"borders of modules in another dtype; {name}"
    yield Row("precision", item, dtype, max(map(len, wrong_dtypes)), 0, not side, side, first, first.split(" ")[0])
    (jax_name, jax_share), (torch_name, torch_share) = worst(shares[0]), worst(shares[1])
    side = verdict(jax_share > differing_allowed, torch_share > differing_allowed, jax_name == torch_name)
    place = (jax_name if jax_share >= torch_share else torch_name) if side else ""
    item = f"outputs of modules: share of elements that differ; {name}"
    yield Row("precision", item, dtype, max(jax_share, torch_share), differing_allowed, not side, side, place, place)


def generating_row(s: Settings, dtype: str) -> Row:
    """The dtypes of a model that generates, cache included, through the generator that the scripts call."""
    cfg = untraced(dataclasses.replace(s.cfg, num_hidden_layers=1, model_type="qwen3", sliding_window=None))
    weights, found = random_weights(cfg, s.seed, dtype), []
    for side, package in zip(s.sides(dtype, cfg), ("jax_llm", "torch_llm"), strict=True):
        with noted_dtypes(package, dtype) as wrong:
            side.stream(weights, [[3, 5, 8], [2]], 4, SamplingConfig(temperature=0.8, seed=s.seed))
        found.append(list(dict.fromkeys(wrong)))
    side = verdict(bool(found[0]), bool(found[1]), found[0] == found[1])
    first = next((x for wrong in found for x in wrong), "")
    item, place = "tensors of another dtype while generating", f"generate ({first.split(' ')[0]})" if side else ""
    return Row("precision", item, dtype, max(map(len, found)), 0, not side, side, first, place)


# Four micro-batches with as many counted targets each, in the moments that one step of a run leaves, which with beta1 =
# 0 are the gradients. Each alone is the same program on a batch in which only its targets count: a quarter of them, and
# a scale of 4 rounds nothing, so every micro-batch's own gradient has the same bits in both. What is left is three
# float32 sums, 2^-24 each of what may be twice as large as the result, times ten. A sum in bfloat16 rounds by 2^-9.
ACCUMULATED = 2.0**-18


def accumulator_row(s: Settings, dtype: str) -> Row:
    """Gradients of accumulated micro-batches against the sum, in float64, of those of each alone."""
    cfg, n = dataclasses.replace(s.cfg, num_hidden_layers=1), 4
    weights = random_weights(cfg, s.seed, dtype)
    ids, targets = (x.astype(np.int32) for x in random_batch(cfg, s.seed, n, s.length, ignored=False))
    # The first step has the rate 0: the second finds the same weights. What the first one left would show: before the
    # whole batch comes the same one, before a part a batch without a target.
    opt = OptimizerConfig(beta1=0.0, max_grad_norm=None, warmup_steps=1, total_steps=2)

    errors = []
    for side in s.sides(dtype, cfg):
        of = lambda counted, first, side=side: (
            side.train(
                start_state(weights, "float32"),
                opt,
                InTurn(
                    [(ids, np.where(rows, targets, spec.IGNORE_INDEX).astype(np.int32)) for rows in (first, counted)]
                ),
                2,
                batch_size=n,
                gradient_accumulation_steps=n,
            ).mu
        )
        rows = np.arange(n)[:, None]
        whole, parts = of(rows >= 0, rows >= 0), [of(rows == i, rows < 0) for i in range(n)]
        total = {name: np.array(sum(part[name].astype(np.float64) / n for part in parts)) for name in whole}
        errors.append(tensor_errors(whole, total))
    row = worse_side("precision", "sum of micro-batches' gradients", dtype, errors, ACCUMULATED)
    return row if row.ok else dataclasses.replace(row, place="loss_and_grads (accumulation)")


# A handful of float32 roundings, 2^-24 each, of the clip factor, its product with a gradient, two products and a sum,
# and for the second moment a square; 32 of them. A gradient or a master rounded to bfloat16 on the way is 2^-9 off.
STEPPED = 2.0**-19


# The step of the rate and the number of the update, as they are after 3 steps and 2 updates, and as they would be if
# one were taken for the other: a wrong step that is right with these has its place there.
COUNTS = (("", 3, 3), ("fit (counters)", 3, 4), ("learning_rate", 2, 3))


def optimizer_row(s: Settings, dtype: str, micro_batches: int, compiled: bool = False) -> Row:
    """A clipped step from the middle of a run in a low precision, against float64 arithmetic on the gradient that the
    run has.

    The gradient is what a step with beta1 = 0 that is not clipped leaves in the first moments. compiled: as a compiled
    run makes it in torch; on a CPU without the compiler.
    """
    cfg, n = dataclasses.replace(s.cfg, num_hidden_layers=1), 2
    weights, rng = random_weights(cfg, s.seed, "float32"), np.random.default_rng((s.seed, 27))
    data = Always(tuple(x.astype(np.int32) for x in random_batch(cfg, s.seed, n, s.length, ignored=False)))
    fields: dict[str, Any] = {
        "batch_size": n,
        "gradient_accumulation_steps": micro_batches,
        "compile": "on" if compiled else "auto",
    }
    errors, places = [], []
    for side in s.sides(dtype, cfg):
        norms: list[float] = []
        note = lambda step, state, metrics, norms=norms: norms.append(float(metrics["grad_norm"]))
        # no clip, by a limit that is not reached: the same program, and so the same bits of a gradient
        opt = OptimizerConfig(beta1=0.0, max_grad_norm=1e9)
        grads = side.train(start_state(weights, "float32"), opt, data, 1, note, **fields).mu
        grads = {name: g.astype(np.float64) for name, g in grads.items()}
        exact_norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        opt = OptimizerConfig(
            lr_max=1e-2, warmup_steps=0, total_steps=9, beta1=0.8, beta2=0.9, max_grad_norm=norms[0] / 3
        )
        start = start_state(weights, "float32")
        start.step, start.adam_count = 3, 2
        for name, g in grads.items():
            start.mu[name][...] = 0.1 * np.abs(g).mean() * rng.standard_normal(g.shape)
            start.nu[name][...] = 0.1 * np.square(g).mean() * rng.random(g.shape)
        as_float64 = lambda tensors: {name: x.astype(np.float64) for name, x in tensors.items()}
        before = [as_float64(x) for x in (start.weights, start.mu, start.nu)]
        clipped = {name: g / 3 for name, g in grads.items()}
        end = side.train(start, opt, data, 4, None, **fields)
        ends = [("weights", end.weights), ("mu", end.mu), ("nu", end.nu)]
        for place, step, updates in COUNTS:
            lr = spec_run.learning_rate(opt, step)
            wanted = spec.adamw_step(before[0], before[1], before[2], clipped, opt, lr, updates)
            found = {"grad_norm": abs(norms[0] / exact_norm - 1.0)}
            for (what, x), y in zip(ends, wanted, strict=True):
                found |= {f"{what} of {name}": e for name, e in tensor_errors(as_float64(x), y).items()}
            if not place:
                errors.append(found)
            elif worst(errors[-1])[1] > STEPPED >= worst(found)[1]:
                places.append(place)
    item = f"clipped step of a run in {micro_batches} micro-batch" + ("es" if micro_batches > 1 else "")
    item += ", the compiled form" if compiled else ""
    row = worse_side("precision", item, dtype, errors, STEPPED)
    place = "clipped_update" if compiled else "AdamW (precision)"
    return row if row.ok else dataclasses.replace(row, place=places[0] if places else place)
