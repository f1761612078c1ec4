"""Checks of sampled tokens: whole texts in float64, single draws in float32, samplers alone for bfloat16."""

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator
from unittest import mock

import numpy as np

from jax_llm.engine import generate as jax_generate
from llm_common.config import SamplingConfig
from parity import spec
from parity.core.compare import TORCH, Row, three_way, verdict
from parity.core.inputs import random_batch, random_weights
from parity.sides.settings import Settings
from torch_llm.engine import decoding, generate
from torch_llm.engine.decoding import GraphCache

# A draw may differ where the float64 margin is below 4 x the measured logit error over the temperature, and such draws
# are rare: at most 5 in 20,000.
FLIPS_ALLOWED = 5 / 20_000
MARGIN_FACTOR = 4.0
# float64: two logarithms of exact numbers, measured 1e-16; noise made in float32 shows 1e-7
NOISE_ALLOWED = 1e-12


def settings(seed: int) -> dict[str, SamplingConfig]:
    return {
        "greedy": SamplingConfig(temperature=0.0, seed=seed),
        "temperature 1": SamplingConfig(seed=seed),
        # filters that cut where the tokens still have weight: one token more or less then shows within a few dozen
        # draws
        "temperature 1.5, top-k 3": SamplingConfig(temperature=1.5, top_k=3, seed=seed + 1),
        "temperature 1.3, top-p 0.6": SamplingConfig(temperature=1.3, top_p=0.6, seed=seed + 2),
        # the highest bit of a seed counts, too
        "top-k 12, top-p 0.9, min-p 0.2": SamplingConfig(top_k=12, top_p=0.9, min_p=0.2, seed=seed ^ 2**31),
    }


def filter_settings(seed: int) -> dict[str, SamplingConfig]:
    """Those, and every filter alone, with one other and with both."""
    values = {"top_k": (0, 12), "top_p": (1.0, 0.9), "min_p": (0.0, 0.2)}
    found = settings(seed)
    for chosen in itertools.product(*values.values()):
        fields = dict(zip(values, chosen, strict=True))
        name = ", ".join(f"{key.replace('_', '-')} {x:g}" for key, x in fields.items() if x != values[key][0])
        if name:
            found.setdefault(name, SamplingConfig(seed=seed, **fields))
    return found


# Where what a filter keeps has exactly the mass that it asks for: with 4 equal logits far above the rest each has a
# quarter.
EQUAL = 4
BORDERS = {
    "top-p of half the mass": SamplingConfig(top_p=0.5),
    "top-p of a quarter": SamplingConfig(top_p=0.25),
    "top-p of half of what top-k leaves": SamplingConfig(top_k=2, top_p=0.5),
}
WHOLE_TEXTS = ("greedy", "top-k 12, top-p 0.9, min-p 0.2")  # the other settings are checked draw by draw


def check_tokens(s: Settings) -> Iterator[Row]:
    """The same tokens from the same seed."""
    if "float64" in s.dtypes:
        yield _noise(s)
        yield from _filters(s)
        yield from _texts(s)
        yield _captured(s)
    for dtype in [d for d in ("float32", "bfloat16") if d in s.dtypes]:
        yield from _draws(s, dtype)
    if "bfloat16" in s.dtypes:
        yield _first_flips(s)


def _noise(s: Settings) -> Row:
    """The noise of the draw as numbers: an error of 1e-7 in it would change no token of any small sample."""
    rows, positions = np.array([0, 3, 3]), np.array([5, 5, 60])
    keys = [spec.fold_in(spec.fold_in((0, s.seed), int(r)), int(p)) for r, p in zip(rows, positions, strict=True)]
    exact = np.stack([-np.log(-np.log(spec.uniform(key, s.cfg.vocab_size))) for key in keys])
    results = [{"noise": side.noise(s.seed, rows, positions)} for side in s.sides("float64")]
    row = three_way("tokens", "Gumbel noise", "float64", [*results, {"noise": exact}], NOISE_ALLOWED)
    return row if row.ok else dataclasses.replace(row, place="gumbel_noise")


def _filters(s: Settings) -> Iterator[Row]:
    """What the filters let through, token by token, from logits with ties."""
    rng = np.random.default_rng((s.seed, 11))
    logits = (
        np.round(4 * rng.standard_normal((40, s.cfg.vocab_size))) / 2
    )  # ties: where a filter cuts among equals matters
    sides = s.sides("float64")
    borders = np.full((8, s.cfg.vocab_size), -800.0)
    for row in borders:
        row[rng.choice(s.cfg.vocab_size, EQUAL, replace=False)] = 1.0
    given = {name: (logits, x) for name, x in filter_settings(s.seed % 2**31).items()}
    given |= {name: (borders, x) for name, x in BORDERS.items()}
    for name, (logits, sampling) in given.items():
        if sampling.temperature == 0.0:
            ids, zeros = np.argmax(logits, axis=-1), np.zeros(len(logits), np.int64)
            wrong = [int((side.sample(logits, sampling, zeros, zeros) != ids).sum()) for side in sides]
            side = verdict(wrong[0] > 0, wrong[1] > 0, wrong[0] == wrong[1])
            place = "sample (greedy)" if side else ""
            yield Row(
                "tokens",
                f"largest of {len(ids)} logits with ties",
                "float64",
                max(wrong),
                0,
                not side,
                side,
                place,
                place,
            )
            continue
        expected = np.stack([spec.filtered(x, sampling) for x in logits])
        found = [side.filtered(logits, sampling) for side in sides]
        wrong = [_unlike(x, expected) for x in found]
        side = verdict(wrong[0] > 0, wrong[1] > 0, wrong[0] == wrong[1])
        item, place = f"filtered logits that differ; {name}", f"filter_logits ({name})" if side else ""
        yield Row("tokens", item, "float64", max(wrong), 0, not side, side, place, place)


def _unlike(a: np.ndarray, b: np.ndarray) -> int:
    """Elements that are excluded on one side alone or differ by more than two spacings."""
    kept = np.isfinite(a) & np.isfinite(b)
    close = np.abs(np.where(kept, a, 0.0) - np.where(kept, b, 0.0)) <= 2.0**-50 * np.abs(np.where(kept, b, 0.0))
    return int((~np.where(kept, close, a == b)).sum())


def _prompts(s: Settings) -> tuple[list[list[int]], int]:
    """Three prompts of different lengths, and how many tokens are to follow them."""
    length = min(5, s.cfg.max_position_embeddings // 4 or 1)
    ids, _ = random_batch(s.cfg, s.seed, 3, length)
    prompts = [ids[0].tolist(), ids[1, : max(1, length - 3)].tolist(), ids[2, : max(1, length - 1)].tolist()]
    return prompts, min(20, s.cfg.max_position_embeddings - length)


def _texts(s: Settings) -> Iterator[Row]:
    """Prefill, cache, sampler and end of text together, in float64: every text must be the specification's.

    The prompts have different lengths, and the texts are longer than what one call of JAX's loop draws.
    The token that ends a text is one that a free text holds, so that it is sure to be drawn.
    """
    weights, (prompts, n_new) = random_weights(s.cfg, s.seed), _prompts(s)
    sides = s.sides("float64")
    for ahead, name in enumerate(WHOLE_TEXTS):
        sampling, differing = settings(s.seed % 2**31)[name], [0, 0, 0]
        free = spec.generate(weights, prompts, s.cfg, sampling, n_new)
        eos_id = free[0][min(3, n_new - 1)]
        expected = [text[: text.index(eos_id)] if eos_id in text else text for text in free]
        with looking_late(ahead):
            texts = [side.generate(weights, prompts, n_new, sampling, (eos_id,)) for side in sides]
        for k, pair in enumerate(((texts[0], expected), (texts[1], expected), (texts[0], texts[1]))):
            differing[k] += sum(a != b for a, b in zip(*pair, strict=True))
        side = verdict(differing[0] > 0, differing[1] > 0, differing[2] == 0)
        place = "generate" if side else ""
        item = f"texts that differ, of {len(expected)}; {name}"
        yield Row("tokens", item, "float64", max(differing), 0, not side, side, "", place)


@contextlib.contextmanager
def looking_late(chunks: int) -> Iterator[None]:
    """While this is open the host looks at drawn tokens so many chunks late, as with an accelerator."""
    late = [mock.patch.object(module, "chunks_ahead", return_value=chunks) for module in (jax_generate, generate)]
    with late[0], late[1]:
        yield


def _captured(s: Settings) -> Row:
    """Texts of torch's steps that are captured once and played again: the same programs for prompts and seeds that come
    later, which find what the earlier ones left, with prompts that are captured and with some that are too many.
    """
    weights, (prompts, n_new) = random_weights(s.cfg, s.seed), _prompts(s)
    side, n_new, wrong, n = s.sides("float64")[1], min(6, n_new), 0, 0
    for limit in (decoding.CAPTURED_PROMPTS, 0):
        programs = GraphCache(compile=False)
        with mock.patch.object(generate, "CAPTURED_PROMPTS", limit):
            for given, name in itertools.product((prompts, [prompts[0][::-1], *prompts[:2]]), WHOLE_TEXTS):
                sampling = dataclasses.replace(settings(s.seed % 2**31)[name], seed=s.seed % 2**31 + n)
                expected = spec.generate(weights, given, s.cfg, sampling, n_new)
                wrong += sum(map(operator.ne, side.captured(weights, given, n_new, sampling, (), programs), expected))
                n += len(given)
    blamed, item = TORCH if wrong else "", f"texts of captured steps that differ, of {n}"
    return Row("tokens", item, "float64", wrong, 0, not wrong, blamed, place="CapturedSteps" if wrong else "")


def _draws(s: Settings, dtype: str) -> Iterator[Row]:
    """Teacher-forced: every position of random sequences is one draw.

    float32: each side draws from its own logits. bfloat16: both draw from the same logits, so that only the samplers
    are compared.
    """
    weights = random_weights(s.cfg, s.seed, dtype)
    n_settings = len(settings(0))
    length = min(32, s.cfg.max_position_embeddings)
    rows = math.ceil(s.tokens / (n_settings * length))
    ids, _ = random_batch(s.cfg, s.seed + 7, rows, length, ignored=False)
    exact = spec.forward(weights, ids, s.cfg)[0]
    sides = s.sides(dtype)
    logits = [side.logits(weights, ids) for side in sides]
    if dtype == "bfloat16":
        exact = logits[0]
        logits = [exact, exact]
    error = max(float(np.abs(x - exact).max()) for x in logits)
    flat = lambda x: x.reshape(-1, s.cfg.vocab_size)
    row = np.repeat(np.arange(rows), length)
    position = np.tile(np.arange(1, length + 1), rows)
    flips, unexplained, notes = [0, 0], [0, 0], []
    for name, sampling in settings(s.seed % 2**31).items():
        expected = np.array(
            [spec.sample(x, sampling, int(r), int(p)) for x, r, p in zip(flat(exact), row, position, strict=True)]
        )
        for k, side in enumerate(sides):
            drawn = side.sample(flat(logits[k]), sampling, row, position)
            for i in np.flatnonzero(drawn != expected):
                margin = draw_margin(flat(exact)[i], sampling, int(row[i]), int(position[i]))
                allowed = allowed_margin(error, flat(exact)[i], sampling)
                flips[k] += 1
                unexplained[k] += not margin < allowed
                notes.append(f"{side.name} {name}: row {row[i]} position {position[i]} margin {margin:.1e}")
    total = rows * length * n_settings
    side = verdict(unexplained[0] > 0, unexplained[1] > 0, unexplained[0] == unexplained[1])
    item = f"draws that differ without reason, of {total}"
    place = "sample" if side else ""
    yield Row("tokens", item, dtype, max(unexplained), 0, not side, side, "; ".join(notes[:5]), place)
    limit = max(1, math.floor(FLIPS_ALLOWED * total))
    side = verdict(flips[0] > limit, flips[1] > limit, False)
    item = f"draws within the margin of rounding, of {total}"
    place = "sample" if side else ""
    yield Row("tokens", item, dtype, max(flips), limit, not side, side, f"logit error {error:.1e}", place)


def _first_flips(s: Settings) -> Row:
    """Greedy texts in bfloat16, where each side goes its own way: both tokens at which two texts part must be as good
    as the best.

    As good: short of it by no more than rounding explains, by the logits of the specification for the text up to there.
    """
    weights, (prompts, n_new), sides = random_weights(s.cfg, s.seed, "bfloat16"), _prompts(s), s.sides("bfloat16")
    greedy = SamplingConfig(temperature=0.0)
    texts = [side.generate(weights, prompts, n_new, greedy) for side in sides]
    unexplained, notes = [0, 0], []
    for row, (prompt, *pair) in enumerate(zip(prompts, *texts, strict=True)):
        at = next((i for i, tokens in enumerate(zip(*pair, strict=True)) if len(set(tokens)) > 1), None)
        if at is None:
            continue
        ids, last = np.zeros((1, len(prompts[0]) + n_new), np.int64), len(prompt) + at - 1
        ids[0, : last + 1] = [*prompt, *pair[0][:at]]
        exact = spec.forward(weights, ids, s.cfg)[0][0, last]
        error = max(float(np.abs(side.logits(weights, ids)[0, last] - exact).max()) for side in sides)
        short = [float(exact.max() - exact[text[at]]) for text in pair]
        for k in range(2):
            unexplained[k] += not short[k] <= MARGIN_FACTOR * error
        notes.append(f"text {row} parts at token {at + 1}: margin {max(short):.1e}, logit error {error:.1e}")
    side = verdict(unexplained[0] > 0, unexplained[1] > 0, False)
    item = f"texts that part without reason, of {len(prompts)} x {n_new} tokens"
    place = "generate" if side else ""
    return Row("tokens", item, "bfloat16", max(unexplained), 0, not side, side, "; ".join(notes) or "none parts", place)


def allowed_margin(logit_error: float, logits: np.ndarray, sampling: SamplingConfig) -> float:
    """How small a margin rounding explains: 4 x the logit error over the temperature, and float32 arithmetic.

    The noise is at most 17 and is added to the logits in float32: four spacings of the largest possible score. A
    cumulative sum of V probabilities errs by at most V x 2^-24, and a border's margin counts it twice.
    """
    if sampling.temperature == 0.0:
        return MARGIN_FACTOR * logit_error
    largest = np.abs(logits).max() / sampling.temperature + 17.0
    arithmetic = 4 * 2.0**-23 * largest + 2 * len(logits) * 2.0**-24
    return MARGIN_FACTOR * logit_error / sampling.temperature + arithmetic


def draw_margin(logits: np.ndarray, sampling: SamplingConfig, row: int, position: int) -> float:
    """The smallest change, in logits over the temperature, that can change this draw: the draw's own or a filter's."""
    if sampling.temperature == 0.0:
        top = np.sort(logits)[-2:]
        return float(top[1] - top[0])
    u = spec.uniform(spec.fold_in(spec.fold_in((0, sampling.seed), row), position), len(logits))
    scores = np.sort(spec.filtered(logits, sampling) - np.log(-np.log(u)))[-2:]
    margins = [float(scores[1] - scores[0])]
    ranked = np.sort(logits / sampling.temperature)[::-1]
    if 0 < sampling.top_k < len(ranked):
        margins.append(float(ranked[sampling.top_k - 1] - ranked[sampling.top_k]))
        ranked = ranked[: sampling.top_k]
    probs = spec.softmax(ranked)
    if sampling.top_p < 1.0:
        before = np.cumsum(probs) - probs
        # a change of d in the logits moves a cumulative probability c by at most 2 d c (1 - c) <= d / 2
        margins.append(2 * float(np.abs(before[1:] - sampling.top_p).min(initial=math.inf)))
    if sampling.min_p > 0.0:
        margins.append(float(np.abs(np.log(probs / probs[0]) - math.log(sampling.min_p)).min()) / 2)
    return min(margins)
