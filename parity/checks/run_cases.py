"""Whole small runs of any settings, through the configs that a user writes, on both sides and in the specification.

Every row goes the way of a run: `TrainConfig` and `OptimizerConfig` into `fit`, batches from a dataset, states and
metrics out.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, SamplingConfig
from llm_common.errors import UserError
from llm_common.run.checkpoint import TrainingState
from parity import spec, spec_run
from parity.checks.model import CEILING, FLOAT64_ALLOWED
from parity.checks.tokens import allowed_margin, draw_margin
from parity.checks.training import MOMENTS_ALLOWED, UPDATE_ALLOWED, update_of
from parity.core import drawn
from parity.core.case_space import (
    MODEL,
    OTHERWISE,
    PLACES,
    POISON,
    SEPARATORS,
    SPACES,
    config_of,
    fix,
    poison,
    poisonous,
    recipe,
    without_poison,
)
from parity.core.compare import (
    EPS,
    Raised,
    Row,
    Tensors,
    crash,
    each_number,
    on_both,
    one_ulp_noise,
    tensor_errors,
    three_way,
    verdict,
    worse_side,
)
from parity.core.drawn import Case, Space
from parity.core.inputs import Always, random_batch, random_weights, start_state
from parity.core.run_control import allowed_error, allowed_errors, control_runs
from parity.sharded.sharded import group_of, run_group
from parity.sides.settings import Settings
from parity.trace.trace import located

Outcome = dict[str, Tensors]


def _outcome(case: Case, start: TrainingState, state: TrainingState, rows: list[dict[str, float]]) -> Outcome:
    """What is compared of a run, by kind. Rows that overflow by design are left out."""

    def clean(tensors: Tensors) -> Tensors:
        return without_poison(tensors) if case["overflow"] != "none" else tensors

    numbers = {}
    for i, row in enumerate(rows):
        # what is not finite, or its square is not, cannot be compared; that the step is skipped is
        has_norm = lambda x: math.isfinite(float(x) * float(x))
        of_step = {f"{key} of step {i + 1}": np.array(float(x)) for key, x in row.items() if has_norm(x)}
        numbers |= of_step
    numbers |= {"step": np.array(float(state.step)), "adam_count": np.array(float(state.adam_count))}
    moments = {f"mu.{k}": x for k, x in clean(state.mu).items()} | {f"nu.{k}": x for k, x in clean(state.nu).items()}
    return {"numbers": numbers, "moments": moments, "update": update_of(clean(state.weights), clean(start.weights))}


def run_row(s: Settings, case: Case, item: str, seed: int) -> Row:
    """A run of a case on both sides and in the specification: the first kind of number that differs, or the worst that
    holds.
    """
    r = recipe(case, seed)
    state = (r.state.weights, r.state.mu, r.state.nu, r.state.step, r.state.adam_count)
    values, rows = spec_run.train(state, r.data.batch, r.until, r.cfg, r.opt, r.fields["document_separator"])

    # A state is read in the middle of some runs, where an update may have been skipped: to read it is to wait for the
    # step.
    read_at = r.state.step + 2 if case["resumed"] else None

    def run(side) -> Outcome:
        kept: list[dict[str, float]] = []

        def note(step, state, metrics) -> None:
            updates = {"adam_count": float(state().adam_count)} if step == read_at else {}
            kept.append(dict(metrics) | updates)

        return _outcome(case, r.state, side.train(r.state, r.opt, r.data, r.until, note, **r.fields), kept)

    if read_at is not None:
        rows[1]["adam_count"] = r.state.adam_count + sum(not row["skipped"] for row in rows[:2])
    outcomes = on_both(s.sides("float64", r.cfg), run)
    expected = _outcome(case, r.state, TrainingState(*values), rows)
    of = lambda kind: [outcome[kind] for outcome in outcomes]
    controls = control_runs(r.state, r.data.batch, r.until, r.cfg, r.opt, r.fields["document_separator"], seed)
    moved = [_outcome(case, r.state, *run) for run in controls]
    of_control = lambda kind: [outcome[kind] for outcome in moved]
    bounds = allowed_errors(FLOAT64_ALLOWED, expected["numbers"], of_control("numbers"))
    found = [each_number("runs", item, of("numbers"), expected["numbers"], bounds)]
    for kind, flat in (("moments", MOMENTS_ALLOWED), ("update", UPDATE_ALLOWED)):
        allowed = allowed_error(flat, expected[kind], of_control(kind))
        found.append(three_way("runs", item, "float64", [*of(kind), expected[kind]], allowed, kind))
    bad = [row for row in found if not row.ok]
    return bad[0] if bad else max(found, key=lambda row: row.measured / row.allowed)


TEXT_ERROR = 2.0**-20  # assumed of float32 logits, relative to the largest: eight roundings of 2^-23, not measured


def text_row(s: Settings, case: Case, item: str, seed: int) -> Row:
    """Texts of a case, from the generator that the scripts call."""
    cfg, rng = config_of(case), np.random.default_rng((seed, 22))
    weights = random_weights(cfg, seed)
    sampling = SamplingConfig(case["temperature"], case["top_k"], case["top_p"], case["min_p"], case["seed"])
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in case["prompts"]]
    numbers = [5 * i + 3 for i in range(len(prompts))] if case["numbers"] else None
    free = spec.generate(weights, prompts, cfg, sampling, case["new"], numbers=numbers)
    stops = tuple(dict.fromkeys([free[0][case["new"] // 2], free[-1][-1], 0][: case["stops"]]))

    def _is_a_flip(prompts, want: list[int], row: int, at: int) -> bool:
        """Whether the draw at which a float32 text parts from the exact one lies within the margin of rounding."""
        ids = np.array([[*prompts[row], *want[:at]]])
        logits = spec.forward(weights, ids, cfg)[0][0, -1]
        number = row if numbers is None else numbers[row]
        error = TEXT_ERROR * float(np.abs(logits).max())
        return draw_margin(logits, sampling, number, ids.shape[1]) < allowed_margin(error, logits, sampling)

    expected = []
    for text in free:
        ends = [text.index(i) for i in stops if i in text]
        expected.append(text[: min(ends)] if ends else text)
    stream = lambda side: side.stream(weights, prompts, case["new"], sampling, stops, numbers, case["chunk"])
    texts = on_both(s.sides(case["dtype"], cfg), stream)
    wrong = [0, 0]
    for k, found in enumerate(texts):
        for row, (text, want) in enumerate(zip(found, expected, strict=True)):
            at = next((i for i, pair in enumerate(itertools.zip_longest(text, want)) if pair[0] != pair[1]), None)
            if at is not None and not (case["dtype"] == "float32" and _is_a_flip(prompts, want, row, at)):
                wrong[k] += 1
    side = verdict(wrong[0] > 0, wrong[1] > 0, texts[0] == texts[1])
    return Row("runs", item, case["dtype"], max(wrong), 0, not side, side)


# What the quicker ladder does not pair: numbers that choose no branch, and what a text meets after its logits are made.
UNPAIRED = {
    "run": ("window", "hidden", "head_dim", "rows", "length", "eps", "theta", "lr"),
    "text": ("window", "family", "heads", "new"),
    "low": (
        "window",
        "micro_batches",
        "chunks",
        "layers",
        "heads",
        "hidden",
        "head_dim",
        "rows",
        "length",
        "eps",
        "theta",
    ),
}


def covering_cases(kind: str, full: bool) -> list[Case]:
    """Cases in which every pair of values meets. Unless `full`: of two values a feature and of all families, and any
    for the rest.
    """
    space = SPACES[kind]
    if full:
        return drawn.covering(space, fix)
    smaller = {name: x if name == "family" else x[:2] for name, x in space.items() if name not in UNPAIRED[kind]}
    rng = np.random.default_rng(25)
    # a kernel that takes a window by itself meets one only where no other mask is there
    windows = [{"family": "mistral", "attention": "fused", "window": x} for x in (4, 5, 6)]
    alone = [{"family": "llama", "attention": "fused"}, *windows] if kind == "low" else []
    rest = {name: values for name, values in space.items() if name not in smaller}
    simplest = {name: values[0] for name, values in space.items()}
    covered = [fix(drawn.draw(rest, rng, lambda case: case) | case) for case in drawn.covering(smaller, fix, tries=300)]
    return [simplest | case for case in alone] + covered


# One seed is judged, not a pool: a tensor's error may be this many times the ceiling of the largest of four that
# rounding makes in the specification, where every weight and intermediate result is moved by one ulp. Of 120 drawn
# cases the largest was 0.26 of it.
LOW_FACTOR, MOVES = 2.0, 4


def low_row(s: Settings, case: Case, item: str, seed: int) -> Row:
    """Loss and gradients of a step of a run in a low precision on both sides, against what rounding explains."""
    cfg, dtype = config_of(case), case["dtype"]
    weights, separator = random_weights(cfg, seed, dtype), SEPARATORS[case["separators"]] or None
    ids, targets = random_batch(cfg, seed, case["micro_batches"] * case["rows"], case["length"])
    if separator is not None:
        ids[np.random.default_rng((seed, 26)).random(ids.shape) < 0.15] = separator[0]

    def everything(w: Tensors, rnd=spec.exact) -> Tensors:
        loss, grads = spec.loss_and_grads(w, ids, targets, cfg, rnd, separator=separator)
        return {"loss": np.array(loss), **grads}

    def errors(found: Tensors) -> dict[str, float]:
        groups = [{"loss": found["loss"]}, {k: found[k] for k in weights}]
        return {k: e for group in groups for k, e in tensor_errors(group, {k: exact[k] for k in group}).items()}

    exact, noises = everything(weights), []
    for i in range(MOVES):
        noise = one_ulp_noise((seed + 7 * i) % 2**32, dtype)
        noises.append(errors(everything({k: noise(x) for k, x in weights.items()}, noise)))
    ceiling = {k: LOW_FACTOR * CEILING[dtype] * max(max(n[k] for n in noises), EPS[dtype]) for k in exact}
    fields = {
        "batch_size": len(ids),
        "gradient_accumulation_steps": case["micro_batches"],
        "loss_chunks": case["chunks"],
        "document_separator": separator,
        "remat": case["remat"],
    }
    # With beta1 = 0 and no clip the first moments are the gradients.
    opt, data = OptimizerConfig(beta1=0.0, max_grad_norm=None), Always((ids.astype(np.int32), targets.astype(np.int32)))

    def shares_of(side) -> dict[str, float]:
        losses: list[float] = []
        end = side.train(
            start_state(weights, "float32"), opt, data, 1, lambda step, state, m: losses.append(m["loss"]), **fields
        )
        found = errors({"loss": np.array(losses[0]), **{k: x.astype(np.float64) for k, x in end.mu.items()}})
        return {k: e / ceiling[k] for k, e in found.items()}

    shares = on_both(dataclasses.replace(s, attention=case["attention"]).sides(dtype, cfg), shares_of)
    return worse_side("runs", item, dtype, shares, 1.0)


def mesh_row(s: Settings, case: Case, item: str, seed: int) -> Row:
    """A run of a case on a mesh, on processes or devices of its own: the first figure that differs, or the worst that
    holds.
    """
    try:
        rows = run_group(group_of(case, seed))
    except UserError as error:
        raise Raised("JAX" if case["framework"] == "jax" else "torch", str(error)) from None
    bad = [row for row in rows if not row.ok]
    row = bad[0] if bad else max(rows, key=lambda row: row.measured / (row.allowed or 1.0))
    return dataclasses.replace(row, check="runs", item=f"{item}: {row.item.partition(': ')[2]}")


ROWS = {"run": run_row, "text": text_row, "low": low_row, "mesh": mesh_row}
HERE = ("run", "text", "low")  # what the ladder judges; meshes are those of `parity sharded` and of `parity run --fuzz`


def case_row(s: Settings, kind: str, case: Case, item: str, seed: int) -> Row:
    """The row of a case; whatever a side raises is a failed row."""
    try:
        return ROWS[kind](s, case, item, seed)
    except Exception as error:
        return dataclasses.replace(crash("runs", error), item=item)


def explained(s: Settings, row: Row, kind: str, case: Case, seed: int) -> Row:
    """A row that fails, with its place: that of a trace of the smallest case that fails, or what that case cannot do
    without.
    """
    if row.ok:
        return row
    fails = lambda simpler: case_row(s, kind, simpler, row.item, seed).side == row.side
    small = drawn.shrink(case, SPACES[kind], fix, fails)
    features = drawn.needed(small, SPACES[kind])
    note = f"{row.note}; smallest: parity run --case '{kind} {seed} {drawn.to_line({f: small[f] for f in features})}'"
    row = dataclasses.replace(row, note=note)
    cfg = config_of(small)
    if kind in (
        "low",
        "mesh",
    ):  # rounding hides modules, processes hide themselves: what the case needs, or the worst tensor
        return dataclasses.replace(row, place=next((x for f, x in PLACES.items() if f in features), row.place))
    if kind == "run":
        r = recipe(small, seed)
        shape = {"batch": r.fields["batch_size"], "length": small["length"]}
        settings = dataclasses.replace(s, cfg=cfg, seed=seed, **shape)
        found = located(dataclasses.replace(row, check="adamw"), settings, cfg, r.fields["document_separator"])
    else:
        found = located(row, dataclasses.replace(s, cfg=cfg, seed=seed), cfg)
    if found.place and found.place != row.place:
        return dataclasses.replace(row, place=found.place, note=f"{found.note}; {note}")
    place = next((x for f, x in PLACES.items() if f in features), row.place or OTHERWISE[kind])
    return dataclasses.replace(row, place=place)


def check_runs(s: Settings) -> Iterator[Row]:
    """Runs and texts in which every pair of settings meets, and a few that are drawn anew by the seed."""
    if "float64" not in s.dtypes:
        return
    yield from _run_rows(s)


class _Skipping:
    """Batches, some of which overflow: one, none, then two in a row."""

    def __init__(self, cfg: ModelConfig, seed: int, overflow: str) -> None:
        self.cfg, self.seed, self.overflow = cfg, seed, overflow

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random_batch(self.cfg, self.seed + step, 2, 6, ignored=False)
        for ids in (inputs, targets):
            ids[ids == POISON] = POISON + 1
        if step in (0, 2, 3):
            poison(self.overflow, inputs, targets)
        return inputs.astype(np.int32), targets.astype(np.int32)


# A limit of skipped updates in a row, and the steps of the run: the last of them may be the one that ends it.
ENDS = ((1, 6), (2, 6), (3, 6), (2, 4), (1, 1))


def _skips_row(s: Settings) -> Row:
    """After how many steps runs end for skipped updates in a row, beside the specification."""
    cfg = config_of({name: values[0] for name, values in MODEL.items()})
    weights, data, opt = random_weights(cfg, s.seed), _Skipping(cfg, s.seed, "nan"), OptimizerConfig(total_steps=6)
    poisonous("nan", weights)
    state = start_state(weights)

    def ended(run: Callable[[], Any]) -> str:
        try:
            run()
        except (UserError, ArithmeticError) as error:
            found = re.search(r"to step (\d+)", str(error))
            return found[1] if found else str(error)
        return "the end"

    of = lambda side: [
        ended(lambda n=n, to=to: side.train(state, opt, data, to, max_skipped_steps=n, batch_size=2)) for n, to in ENDS
    ]
    results = on_both(s.sides("float64", cfg), of)
    start = (state.weights, state.mu, state.nu, 0, 0)
    expected = [
        ended(lambda n=n, to=to: spec_run.train(start, data.batch, to, cfg, opt, max_skipped=n)) for n, to in ENDS
    ]
    wrong = [sum(a != b for a, b in zip(found, expected, strict=True)) for found in results]
    side = verdict(wrong[0] > 0, wrong[1] > 0, results[0] == results[1])
    note = f"ended at {results} for {expected}" if side else ""
    return Row(
        "runs",
        "steps after which skips end a run",
        "float64",
        max(wrong),
        0,
        not side,
        side,
        note,
        "fit" if side else "",
    )


def _after_skips_row(s: Settings, overflow: str) -> Row:
    """What is learned over skips one by one and two in a row: the number of an update counts the updates alone."""
    cfg = config_of({name: values[0] for name, values in MODEL.items()})
    weights, data, opt = random_weights(cfg, s.seed), _Skipping(cfg, s.seed, overflow), OptimizerConfig(total_steps=6)
    poisonous(overflow, weights)
    state, start = start_state(weights), without_poison(weights)
    learned = lambda end: {name: x - start[name] for name, x in without_poison(end).items()}
    ends = on_both(s.sides("float64", cfg), lambda side: learned(side.train(state, opt, data, 6, batch_size=2).weights))
    end, _ = spec_run.train((state.weights, state.mu, state.nu, 0, 0), data.batch, 6, cfg, opt)
    item = f"update after skips; {overflow}"
    row = three_way("runs", item, "float64", [*ends, learned(end[0])], UPDATE_ALLOWED)
    return row if row.ok else dataclasses.replace(row, place="fit (skipped updates)")


def _run_rows(s: Settings) -> Iterator[Row]:
    yield _skips_row(s)
    for overflow in ("nan", "gradient"):
        yield _after_skips_row(s, overflow)
    for kind in HERE:
        space = SPACES[kind]
        cases = covering_cases(kind, s.full)
        for i, case in enumerate(cases[:2] if s.quick else cases):
            row = case_row(s, kind, case, f"{kind} {i + 1} of {len(cases)}: {short(case, space)}", s.seed)
            yield explained(s, row, kind, case, s.seed)
    for i, kind in enumerate(HERE):
        space = SPACES[kind]
        case = drawn.draw(space, np.random.default_rng((s.seed, 23, i)), fix)
        row = case_row(s, kind, case, f"{kind} drawn with seed {s.seed}: {short(case, space)}", s.seed)
        yield explained(s, row, kind, case, s.seed)


def short(case: Case, space: Space) -> str:
    """What of a case is not at its simplest, for people."""
    parts = []
    for name in drawn.needed(case, space):
        value = case[name]
        text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
        parts.append(name if value is True else f"{name} {text}")
    return ", ".join(parts) or "plain"
