"""Checks of the model: the specification itself, initial weights, logits, loss, the gradient of every tensor, the
cache.
"""

import contextlib
import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_common.config import ModelConfig
from parity import spec
from parity.core.compare import (
    BOTH,
    EPS,
    JAX,
    TORCH,
    Row,
    Tensors,
    one_ulp_noise,
    round_to,
    spacing,
    tensor_errors,
    tensor_sizes,
    three_way,
    verdict,
    worst,
)
from parity.core.compile_time import quick_to_compile
from parity.core.inputs import families, random_batch, random_weights, shapes_of_logits, variants
from parity.sides.settings import Settings
from parity.trace.trace import located, located_or, trace_cache

# float64, logits, loss and gradients: measured at most 7e-15 over shapes and seeds; the smallest planted bug that
# changes mathematics (an epsilon of 1e-6 for 1e-5 in the norm) changes logits by 1e-6, a RoPE table in float32 by 6e-9.
FLOAT64_ALLOWED = 1e-12
# Complex steps have no cancellation: what is left is rounding in a sum over all weights (measured below 1e-13).
COMPLEX_STEP_ALLOWED = 1e-11
# One side may err at most this many times as much as the other, in the geometric mean over 16 seeds. Of a single tensor
# the logarithm of the ratio scatters by up to 0.65, so the mean of 16 by 0.16: a factor of 3 is 6 of those. Measured
# over 23 random configs: at most 1.57. The root of summed squares, which one seed with a large error decides, reached
# 4.2 on the same configs.
RATIO_ALLOWED = {"logits": 2.0, "gradients": 3.0}
SMALL = 64  # tensors with fewer elements are pooled over layers: a ratio of two small sums of squares is noise
# The ceiling is the specification's own error when every weight and every intermediate result is moved by one ulp up or
# down, twice the largest error that rounding to nearest makes. In float32 the sums inside a matrix product are rounded
# too, term by term: some sqrt(n) / 3 ulps for n terms, hence the factor. Measured: 0.2 to 0.3 of the ceiling in both
# dtypes; an op that rounds to bfloat16 inside a float32 run is at 1,000 times the ceiling. A side whose error is below
# this share of what one ulp makes does not compute in its dtype: measured at least 0.1.
ROUNDS_AT_LEAST = 0.02
CEILING = {"float32": 4.0, "bfloat16": 1.0}


def check_spec(s: Settings) -> Iterator[Row]:
    """The specification's gradients against complex steps along random directions: no finite differences."""
    for name, cfg in variants(s.cfg).items():
        weights = random_weights(cfg, s.seed)
        ids, targets = random_batch(cfg, s.seed, s.batch, s.length)
        _, grads = spec.loss_and_grads(weights, ids, targets, cfg)
        rng = np.random.default_rng((s.seed, 3))
        error = 0.0
        for _ in range(3):
            direction = {key: rng.standard_normal(x.shape) for key, x in weights.items()}
            moved = {key: x + 1e-30j * direction[key] for key, x in weights.items()}
            slope = spec.cross_entropy(spec.forward(moved, ids, cfg)[0], targets).imag / 1e-30
            products = [grads[key] * direction[key] for key in weights]
            scale = math.sqrt(sum(float((x**2).sum()) for x in products))
            error = max(error, abs(sum(float(x.sum()) for x in products) - slope) / scale)
        ok = error <= COMPLEX_STEP_ALLOWED
        side = "" if ok else "the specification"
        yield Row("spec", f"gradient = complex step; {name}", "float64", error, COMPLEX_STEP_ALLOWED, ok, side)


def check_init(s: Settings) -> Iterator[Row]:
    """The weights from which training starts, bit for bit: random bits, order of names, widths.

    Of two seeds: 0 would hide which word of the key it is, and one with the highest bit set how it is read.
    """
    for dtype in s.dtypes:  # of bfloat16: its float32 masters
        yield _init_row(s, dtype, s.seed)
        if dtype == "float32" or "float32" not in s.dtypes:
            yield _init_row(s, dtype, (s.seed + 0x9E3779B9) % 2**32)
    # The same arithmetic on other tensors in other orders: an optimised program has been judged above.
    with quick_to_compile() if s.device == "cpu" and not s.full else contextlib.nullcontext():
        if "float64" in s.dtypes:
            for name in ("Qwen2: biases", "Qwen3: norms of q and k"):
                for tied in (False, True):
                    cfg = dataclasses.replace(families(s.cfg)[name], tie_word_embeddings=tied)
                    what = f"; {name}{', tied' if tied else ''}"
                    yield _init_row(dataclasses.replace(s, cfg=cfg), "float64", s.seed, what)
            deep = dataclasses.replace(s.cfg, num_hidden_layers=12)  # "10" sorts before "2", and ends as "0" does
            yield _init_row(dataclasses.replace(s, cfg=deep), "float64", s.seed, "; 12 layers")
        if "bfloat16" in s.dtypes:
            yield _init_row(s, "bfloat16", s.seed, "; of the model alone", lambda side: side.initial_model(s.seed))


def _init_row(s: Settings, dtype: str, seed: int, what: str = "", made: Callable[[Any], Tensors] | None = None) -> Row:
    """made: by what a side makes them, if not as a run does; such weights have `dtype`, not that of masters."""
    sides = [side.initial_weights(seed) if made is None else made(side) for side in s.sides(dtype)]
    expected = {}
    for i, (name, shape) in enumerate(spec.weight_shapes(s.cfg).items()):
        x = spec.initial_weight(seed, i, name, shape, s.cfg.num_hidden_layers)
        if dtype != "float64" and len(shape) > 1:
            # u - 0.5 is exact in float32; the width is rounded, then the product
            width = spec.initial_width(name, s.cfg.num_hidden_layers)
            u = spec.uniform(spec.fold_in((0, seed), i), math.prod(shape)).reshape(shape)
            x = (u - 0.5).astype(np.float32) * np.float32(width)
        expected[name] = round_to(x.astype(np.float64), dtype) if made is not None else x.astype(np.float64)
    differing = [_differing_elements(a, expected) for a in sides]
    pair = _differing_elements(sides[0], sides[1])
    side = verdict(differing[0] > 0, differing[1] > 0, pair == 0)
    first = next((name for name, x in expected.items() if any(_differs(a, name, x) for a in sides)), "")
    place = f"initial weights: {first}" if first else ""
    return Row(
        "init",
        f"elements that differ, seed {seed}{what}",
        dtype,
        max(*differing, pair),
        0,
        not side,
        side,
        place,
        place,
    )


def _differing_elements(a: Tensors, b: Tensors) -> int:
    """How many elements of b another value, or no value at all, stands for in a."""
    return sum(_differs(a, name, x) for name, x in b.items())


def _differs(a: Tensors, name: str, x: np.ndarray) -> int:
    return int((a[name] != x).sum()) if name in a and a[name].shape == x.shape else x.size


def check_logits(s: Settings) -> Iterator[Row]:
    """Logits of the same weights and tokens."""
    yield from _check_model(s, "logits")


def check_gradients(s: Settings) -> Iterator[Row]:
    """The loss, and its gradient for every tensor by name."""
    yield from _check_model(s, "gradients")


TRACES = 2  # of the rows that fail, so many are traced: one bug fails most of them, and its place is the same


def _check_model(s: Settings, what: str) -> Iterator[Row]:
    traced = 0

    def placed(row: Row, settings: Settings, cfg: ModelConfig) -> Row:
        nonlocal traced
        traced += not row.ok
        return located(row, settings, cfg) if traced <= TRACES else row

    if "float64" in s.dtypes and what == "logits":
        for name, (cfg, batch, length) in shapes_of_logits(s.cfg, s.batch, s.length).items():
            weights = random_weights(cfg, s.seed)
            ids, _ = random_batch(cfg, s.seed, batch, length)
            sides = s.sides("float64", cfg)
            results = [{"logits": side.logits(weights, ids)} for side in sides]
            results.append({"logits": spec.forward(weights, ids, cfg)[0]})
            row = three_way("logits", name, "float64", results, FLOAT64_ALLOWED)
            yield placed(row, dataclasses.replace(s, batch=batch, length=length), cfg)
    if "float64" in s.dtypes and what == "gradients":
        for name, cfg in variants(s.cfg).items():
            if cfg.rope_scaling is not None and s.cfg.rope_scaling is None:
                continue  # another table, whose gradient is the same code: the logits see it
            weights = random_weights(cfg, s.seed)
            ids, targets = random_batch(cfg, s.seed, s.batch, s.length)
            sides = s.sides("float64", cfg)
            pairs = [side.loss_and_grads(weights, ids, targets) for side in sides]
            pairs.append(spec.loss_and_grads(weights, ids, targets, cfg))
            losses = [{"loss": np.array(loss)} for loss, _ in pairs]
            yield placed(three_way("loss", name, "float64", losses, FLOAT64_ALLOWED), s, cfg)
            row = three_way("gradients", name, "float64", [grads for _, grads in pairs], FLOAT64_ALLOWED)
            yield placed(row, s, cfg)
        yield from _check_parts(s)
        yield from _check_documents(s)
    for dtype in [d for d in ("float32", "bfloat16") if d in s.dtypes]:
        yield from _check_pooled(s, what, dtype)


def _check_parts(s: Settings) -> Iterator[Row]:
    """A batch in three micro-batches, one with few targets that count and one with none, and logits in parts, against
    the whole.
    """
    weights = random_weights(s.cfg, s.seed)
    ids, targets = random_batch(s.cfg, s.seed, 3, s.length - s.length % 3 or s.length)
    targets[1], targets[2, 1:] = -100, -100
    exact = spec.loss_and_grads(weights, ids, targets, s.cfg)
    chunks = 3 if ids.shape[1] % 3 == 0 else 1
    for item, parts in (
        ("three micro-batches, uneven token counts", (3, 1)),
        (f"logits in {chunks} parts", (1, chunks)),
    ):
        pairs = [*(side.loss_and_grads(weights, ids, targets, *parts) for side in s.sides("float64")), exact]
        place = "chunked_cross_entropy" if parts[1] > 1 else "loss_and_grads (accumulation)"
        losses = [{"loss": np.array(loss)} for loss, _ in pairs]
        yield located_or(three_way("loss", item, "float64", losses, FLOAT64_ALLOWED), s, None, place)
        row = three_way("gradients", item, "float64", [grads for _, grads in pairs], FLOAT64_ALLOWED)
        yield located_or(row, s, None, place)


def _check_documents(s: Settings) -> Iterator[Row]:
    """Several documents in a row of the batch: one at the very start that is its end alone, two ends together, one at
    the end.
    """
    weights, separator = random_weights(s.cfg, s.seed), (1, 2)
    ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
    ids[np.isin(ids, separator)] = 0
    t = ids.shape[1]
    for row, places in enumerate(([0, t // 2], [t // 3, t // 3 + 1], [t - 1], [])[: len(ids)]):
        for number, i in enumerate(i for i in places if i < t):
            ids[row, i] = separator[number % 2]
    exact = spec.loss_and_grads(weights, ids, targets, s.cfg, separator=separator)
    logits = {"logits": spec.forward(weights, ids, s.cfg, separator=separator)[0]}
    for item, fields in (("document mask", {}), ("document mask, remat", {"remat": "full"})):
        sides = [side.variant(separator=separator, **fields) for side in s.sides("float64")]
        pairs = [*(side.loss_and_grads(weights, ids, targets) for side in sides), exact]
        place = "remat" if fields else "inside_documents"
        losses = [{"loss": np.array(loss)} for loss, _ in pairs]
        yield located_or(three_way("loss", item, "float64", losses, FLOAT64_ALLOWED), s, None, place, separator)
        row = three_way("gradients", item, "float64", [grads for _, grads in pairs], FLOAT64_ALLOWED)
        yield located_or(row, s, None, place, separator)
        if not fields:
            found = [{"logits": side.logits(weights, ids)} for side in sides]
            row = three_way("logits", item, "float64", [*found, logits], FLOAT64_ALLOWED)
            yield located_or(row, s, None, place, separator)


def _check_pooled(s: Settings, what: str, dtype: str) -> Iterator[Row]:
    """Rule for low precision: neither side errs much more than the other, and neither more than rounding explains."""
    sides = s.sides(dtype)
    squares: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(3)]
    sizes: defaultdict[str, float] = defaultdict(float)
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    losses: list[list[float]] = [[], [], []]
    for i in range(s.seeds):
        seed = s.seed + 100 * i
        weights = random_weights(s.cfg, seed, dtype)
        ids, targets = random_batch(s.cfg, seed, s.batch, s.length)
        noise = one_ulp_noise(seed, dtype)
        moved = {name: noise(x) for name, x in weights.items()}
        if what == "logits":
            exact = {"logits": spec.forward(weights, ids, s.cfg)[0]}
            results = [{"logits": side.logits(weights, ids)} for side in sides]
            results.append({"logits": spec.forward(moved, ids, s.cfg, noise)[0]})
        else:
            loss, exact = spec.loss_and_grads(weights, ids, targets, s.cfg)
            pairs = [side.loss_and_grads(weights, ids, targets) for side in sides]
            pairs.append(spec.loss_and_grads(moved, ids, targets, s.cfg, noise))
            results = [grads for _, grads in pairs]
            for k, (low, _) in enumerate(pairs):
                losses[k].append(low - loss)
        all_errors = [tensor_errors(result, exact) for result in results]
        for name, size in tensor_sizes(exact).items():
            sizes[_pool(name, exact)] += size**2
            for k, errors in enumerate(all_errors):
                squares[k][_pool(name, exact)] += (errors[name] * size) ** 2
            ratios[_pool(name, exact)].append(_log_ratio(all_errors[0][name], all_errors[1][name], dtype))
    # sums of squares over sums of squares, not means of ratios: a seed whose gradient all but vanishes, as behind a
    # saturated softmax, has a huge relative error on either side by chance
    pooled = [{name: math.sqrt(x / sizes[name]) for name, x in square.items()} for square in squares]
    yield from _ceiling_rows(what, dtype, *pooled)
    means = {name: float(np.mean(values)) for name, values in ratios.items()}
    yield _ratio_row(what, dtype, means, *({n: x[n] / max(pooled[2][n], 1e-300) for n in means} for x in pooled[:2]))
    if what == "gradients":
        yield _loss_row(dtype, losses, float(spacing(np.array(loss), "float32")))


def specified(s: Settings, weights: Tensors, ids: np.ndarray, targets: np.ndarray, noise=None) -> dict[str, Tensors]:
    """The specification's logits and gradients, with `noise` on every weight and intermediate result if it is given."""
    if noise is not None:
        weights = {name: noise(x) for name, x in weights.items()}
    rnd = noise or spec.exact
    return {
        "logits": {"logits": spec.forward(weights, ids, s.cfg, rnd)[0]},
        "gradients": spec.loss_and_grads(weights, ids, targets, s.cfg, rnd)[1],
    }


def _pool(name: str, tensors: Tensors) -> str:
    return re.sub(r"layers\.\d+", "layers.*", name) if tensors[name].size < SMALL else name


def _ceiling_rows(what: str, dtype: str, jax: dict, torch: dict, noise: dict) -> Iterator[Row]:
    """Each side's pooled error as a share of the ceiling; the worst tensor decides."""
    shares = [{n: x / max(CEILING[dtype] * noise[n], 1e-300) for n, x in side.items()} for side in (jax, torch)]
    (jax_name, jax_share), (torch_name, torch_share) = worst(shares[0]), worst(shares[1])
    side = verdict(jax_share > 1, torch_share > 1, _alike(jax, torch, jax_name) and _alike(jax, torch, torch_name))
    name = jax_name if jax_share >= torch_share else torch_name
    measured = max(jax[name], torch[name])
    yield Row(what, "error against float64", dtype, measured, CEILING[dtype] * noise[name], not side, side, name)


def _alike(jax: dict, torch: dict, name: str) -> bool:
    return 0.5 < jax[name] / max(torch[name], 1e-300) < 2.0


def _log_ratio(jax: float, torch: float, dtype: str) -> float:
    """log(JAX's error / torch's), 0 where both are exact; a result that is not finite counts as a very large error."""
    floor, ceiling = EPS[dtype] * 1e-3, 1e6
    return math.log((min(jax, ceiling) + floor) / (min(torch, ceiling) + floor))


def _ratio_row(what: str, dtype: str, ratios: dict[str, float], jax: dict, torch: dict) -> Row:
    """The larger of the two sides' errors over the smaller. jax, torch: the errors as shares of what one ulp makes.

    To blame is the less accurate side; but a side that is far more accurate than its dtype can be has left out a
    rounding.
    """
    name = max(ratios, key=lambda n: abs(ratios[n]))
    ratio = math.exp(abs(ratios[name]))
    ok = ratio <= RATIO_ALLOWED[what]
    worse, better = ((JAX, jax), (TORCH, torch)) if ratios[name] > 0 else ((TORCH, torch), (JAX, jax))
    too_good = better[1][name] < ROUNDS_AT_LEAST and worse[1][name] <= CEILING[dtype]
    side = "" if ok else better[0] if too_good else worse[0]
    return Row(what, "ratio of the two sides' errors", dtype, ratio, RATIO_ALLOWED[what], ok, side, name)


def _loss_row(dtype: str, losses: list[list[float]], ulp: float) -> Row:
    """|loss_JAX - loss_torch| <= 4 x (rms errors of both) + 2 spacings; the rms of each is capped by the ceiling."""
    rms = [math.sqrt(sum(x * x for x in side) / len(side)) for side in losses]
    ceiling = rms[2] + 2 * ulp
    measured = max(abs(a - b) for a, b in zip(losses[0], losses[1], strict=True))
    allowed = 4 * (min(rms[0], ceiling) + min(rms[1], ceiling)) + 2 * ulp
    bad = [measured > allowed and rms[k] == max(rms[0], rms[1]) for k in (0, 1)]
    over = [not rms[k] <= 2 * ceiling for k in (0, 1)]
    side = verdict(over[0] or bad[0], over[1] or bad[1], measured <= allowed) or ("" if measured <= allowed else BOTH)
    return Row("loss", f"difference over {len(losses[0])} seeds", dtype, measured, allowed, not side, side)


def check_cache(s: Settings) -> Iterator[Row]:
    """Logits of cached decoding against a full forward pass, one of each side's own and one of the specification."""
    ids, _ = random_batch(s.cfg, s.seed, s.batch, s.length)
    prompt = max(1, ids.shape[1] // 3)
    if ids.shape[1] < 3:
        return
    # with a window and scaled frequencies the mask and the table of a cached pass are others than those of a whole one
    others = families(s.cfg)
    configs = {"": s.cfg} | {f"; {name}": others[name] for name in ("Mistral: window of 4", "Llama 3: scaled RoPE")}
    for dtype in [d for d in ("float64", "float32") if d in s.dtypes]:
        for name, cfg in configs.items() if dtype == "float64" else [("", s.cfg)]:
            yield _cache_row(dataclasses.replace(s, cfg=cfg), ids, prompt, dtype, name)
        if dtype == "float64":
            biased = dataclasses.replace(s, cfg=others["Qwen2: biases"])
            yield _cache_row(biased, ids, prompt, dtype, "; Qwen2: biases; projections fused", fused=True)
            yield _cache_row(s, ids, prompt, dtype, "; of a model that trains with remat", trains=True)


def _cache_row(
    s: Settings, ids: np.ndarray, prompt: int, dtype: str, name: str, fused: bool = False, trains: bool = False
) -> Row:
    """trains: with the way through the layers that a run may be given."""
    weights = random_weights(s.cfg, s.seed, dtype)
    exact = {"logits": spec.forward(weights, ids, s.cfg)[0]}
    sides = s.sides(dtype)
    if trains:
        sides = sides[0].variant(remat="full", scan_layers=True), sides[1].variant(remat="full")
    results = [{"logits": side.cached_logits(weights, ids, prompt, fused)} for side in sides]
    allowed = FLOAT64_ALLOWED
    if dtype == "float32":
        noise = one_ulp_noise(s.seed, dtype)
        moved = {name: noise(x) for name, x in weights.items()}
        noisy = {"logits": spec.forward(moved, ids, s.cfg, noise)[0]}
        # one seed, not a pool: the ceiling is doubled
        allowed = 2 * CEILING[dtype] * worst(tensor_errors(noisy, exact))[1]
    row = three_way("cache", f"cached decoding = full forward{name}", dtype, [*results, exact], allowed)
    if fused and not row.ok:
        return dataclasses.replace(row, place="fuse_projections")  # no other figure of the ladder has them
    if trains and not row.ok:
        return dataclasses.replace(row, place="layers (remat, cached)")
    return row if row.ok or dtype != "float64" else trace_cache(row, s)
