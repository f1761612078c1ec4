"""Whole small runs of any settings, through the configs that a user writes, on both sides and in the specification.

Every row goes the way of a run: `TrainConfig` and `OptimizerConfig` into `fit`, batches from a dataset, states and metrics out.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llm_common.checkpoint import TrainingState
from llm_common.config import ModelConfig, OptimizerConfig, RopeScaling, SamplingConfig
from llm_common.errors import UserError, first_line
from parity import drawn, spec, spec_run
from parity.cases import random_batch, random_weights, start_state
from parity.compare import EPS, Row, Tensors, crash, tensor_errors, three_way, verdict, worst
from parity.drawn import Case, Space
from parity.model_checks import CEILING, FLOAT64_ALLOWED, one_ulp_noise
from parity.settings import Settings
from parity.token_checks import allowed_margin, draw_margin
from parity.trace import located
from parity.training_checks import MOMENTS_ALLOWED, UPDATE_ALLOWED, update_of

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "llama 3")
# The values of a feature: the simplest first, then the one that the quicker ladder pairs with those of other features.
MODEL: Space = {
    "family": FAMILIES,
    "tied": (False, True),
    "layers": (1, 2, 3),
    "heads": ((2, 2), (4, 2), (6, 2), (3, 1)),  # of queries, of keys and values
    "head_dim": (4, 6, 10),
    "hidden": (16, 24),
    "eps": (1e-5, 1e-3, 1e-6),
    "theta": (1e4, 30.0, 5e5),
}
RUN: Space = MODEL | {
    "length": (6, 12),
    "micro_batches": (1, 3, 2),
    "rows": (1, 2),  # of a micro-batch
    "chunks": (1, 3, 2),
    "separators": (0, 2, 1),
    "remat": ("none", "full", "dots"),
    "scan": (False, True),
    "counted": ("all", "few", "most", "none"),
    "betas": ((0.9, 0.95), (0.8, 0.99), (0.0, 0.5), (0.95, 0.999)),
    "adam_eps": (1e-8, 1e-3),
    "decay": (0.1, 0.0, 0.5),
    "clip": ("none", "active", "loose"),
    "schedule": ((0, 9), (2, 5), (1, 3)),  # warmup and total: past the end, too
    "lr": ((1e-3, 1e-4), (3e-2, 0.0)),
    "resumed": (False, True),  # from a state with fewer updates than steps
    "overflow": ("none", "nan", "inf", "-inf"),  # in the second step, then on
}
TEXT: Space = {"family": FAMILIES, "tied": (False, True), "heads": MODEL["heads"]} | {
    "prompts": ((3, 3), (1, 4, 2), (5,)),  # how long they are
    "new": (4, 11),
    "dtype": ("float64", "float32"),
    "temperature": (1.0, 0.7, 0.0, 1.6),
    "top_k": (0, 7, 1),
    "top_p": (1.0, 0.5, 0.85),
    "min_p": (0.0, 0.25),
    "stops": (0, 3, 1),
    "numbers": (False, True),  # of the texts, given
    "seed": (0, 7, 2**32 - 1),
    "chunk": (16, 5, 1),  # tokens between two looks of the host
}
LOW: Space = MODEL | {
    "dtype": ("float32", "bfloat16"),
    "attention": ("reference", "fused"),
    "length": (6, 12),
    "micro_batches": (1, 3, 2),
    "rows": (1, 2),
    "chunks": (1, 3, 2),
    "separators": (0, 2, 1),
    "remat": ("none", "full", "dots"),
}
# What a user names a feature by, where the specification cannot see deeper: the function that it decides about.
PLACES = {
    "overflow": "train_step (skipped update)",
    "micro_batches": "loss_and_grads (accumulation)",
    "chunks": "chunked_cross_entropy",
    "separators": "document mask",
    "remat": "remat",
    "scan": "scan_layers",
    "attention": "dot_product_attention",
    "clip": "clip",
    "decay": "AdamW (decay)",
    "betas": "AdamW",
    "adam_eps": "AdamW",
    "resumed": "fit (counters)",
    "schedule": "learning_rate",
    "lr": "learning_rate",
    "counted": "cross_entropy",
    "top_k": "filter_logits",
    "top_p": "filter_logits",
    "min_p": "filter_logits",
    "stops": "generate (stop ids)",
    "numbers": "generate (text ids)",
    "prompts": "prefill",
    "chunk": "generate (chunk)",
    "temperature": "sample",
    "seed": "random_bits",
}
OTHERWISE = {"run": "train_step", "text": "generate", "low": "loss_and_grads"}  # where a case without any feature fails
STEPS = 3


def fix(case: Case) -> Case:
    """What cannot be together: a tied head has the row of the embedding that overflows in every batch."""
    return {**case, "overflow": "none"} if case.get("tied") and case.get("overflow", "none") != "none" else case


SPACES: dict[str, Space] = {"run": RUN, "text": TEXT, "low": LOW}


def config_of(case: Case) -> ModelConfig:
    case = {name: values[0] for name, values in MODEL.items()} | {"layers": 2} | case
    family, (queries, kv) = case["family"], case["heads"]
    scaling = RopeScaling(4.0, 1.0, 3.0, 20) if family == "llama 3" else None
    return ModelConfig(
        41,
        case["hidden"],
        20,
        case["layers"],
        queries,
        kv,
        head_dim=case["head_dim"],
        max_position_embeddings=24,
        rope_theta=case["theta"],
        rms_norm_eps=case["eps"],
        tie_word_embeddings=case["tied"],
        model_type="llama" if family == "llama 3" else family,
        rope_scaling=scaling,
        sliding_window=4 if family == "mistral" else None,
    )


POISON = 5  # a token whose row of the embedding is not finite


class Batches:
    """A batch for each step; in the second of the run the token that overflows, where the case has one."""

    def __init__(self, case: Case, cfg: ModelConfig, seed: int, first: int) -> None:
        self.case, self.cfg, self.seed, self.first = case, cfg, seed, first

    @functools.cached_property
    def separators(self) -> tuple[int, ...]:
        return (7, 11)[: self.case["separators"]]

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        case, rng = self.case, np.random.default_rng((self.seed, 20, step))
        inputs, targets = random_batch(
            self.cfg, self.seed + 31 * step, case["micro_batches"] * case["rows"], case["length"], ignored=False
        )
        inputs[inputs == POISON] = POISON + 1
        for i in self.separators:  # some documents end within a row, at its very start and end among others
            inputs[rng.random(inputs.shape) < 0.15] = i
        share = {"all": 1.0, "most": 0.7, "few": 0.1, "none": 0.0}[case["counted"]]
        counted = rng.random(targets.shape) < share
        if case["counted"] == "few":  # all of them in one micro-batch
            counted[1:], counted[0, -2:] = False, True
        if case["counted"] == "none" and step != self.first:
            counted[:] = True
        targets[~counted] = spec.IGNORE_INDEX
        if case["overflow"] != "none" and step == self.first + 1:
            inputs[0, 0], targets[0, -1] = POISON, 3  # a counted target sees it
        return inputs.astype(np.int32), targets.astype(np.int32)


@dataclasses.dataclass
class Recipe:
    """All of a case: what the two sides and the specification are given."""

    cfg: ModelConfig
    opt: OptimizerConfig
    fields: dict[str, Any]  # of TrainConfig
    state: TrainingState
    data: Batches

    @property
    def until(self) -> int:
        return self.state.step + STEPS


def recipe(case: Case, seed: int) -> Recipe:
    cfg = config_of(case)
    weights, rng = random_weights(cfg, seed), np.random.default_rng((seed, 21))
    step, count = (4, 2) if case["resumed"] else (0, 0)
    data = Batches(case, cfg, seed, step)
    separator = data.separators or None
    _, grads = spec.loss_and_grads(weights, *data.batch(step), cfg, separator=separator)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    max_norm = {"none": None, "active": norm / 3 or 1.0, "loose": 3 * norm or 1.0}[case["clip"]]
    zero = lambda scale: {
        name: scale * rng.random(x.shape) if case["resumed"] else np.zeros(x.shape) for name, x in weights.items()
    }
    state = TrainingState(weights, zero(0.01), zero(1e-4), step, count)
    if case["overflow"] != "none":
        weights["model.embed_tokens.weight"][POISON] = float(case["overflow"])
    (warmup, total), (lr_max, lr_min), (beta1, beta2) = case["schedule"], case["lr"], case["betas"]
    opt = OptimizerConfig(
        lr_max=lr_max,
        lr_min=lr_min,
        warmup_steps=warmup,
        total_steps=total,
        beta1=beta1,
        beta2=beta2,
        eps=case["adam_eps"],
        weight_decay=case["decay"],
        max_grad_norm=max_norm,
    )
    fields = {
        "batch_size": case["micro_batches"] * case["rows"],
        "gradient_accumulation_steps": case["micro_batches"],
        "loss_chunks": case["chunks"],
        "document_separator": separator,
        "remat": case["remat"],
        "scan_layers": case["scan"],
        "seed": seed,
    }
    return Recipe(cfg, opt, fields, state, data)


class Raised(Exception):
    """One side raised, or both did."""

    def __init__(self, side: str, note: str) -> None:
        super().__init__(note)
        self.side, self.note = side, note


def on_both(sides: Any, call: Callable[[Any], Any]) -> list[Any]:
    """What both sides give. Raises Raised, with the side that raised something."""
    results, raised = [], []
    for side in sides:
        try:
            results.append(call(side))
            raised.append("")
        except Exception as error:  # whatever a broken side raises is a finding
            raised.append(f"{type(error).__name__}: {first_line(error)}")
    if any(raised):
        alike = raised[0].split(":")[0] == raised[1].split(":")[0]
        raise Raised(verdict(bool(raised[0]), bool(raised[1]), alike), next(filter(None, raised)))
    return results


Outcome = dict[str, Tensors]


def _outcome(case: Case, start: TrainingState, state: TrainingState, rows: list[dict[str, float]]) -> Outcome:
    """What is compared of a run, by kind. A row of the embedding that is not finite by design is left out."""

    def clean(tensors: Tensors) -> Tensors:
        tensors = {name: np.array(x, np.float64) for name, x in tensors.items()}
        if case["overflow"] != "none":
            tensors["model.embed_tokens.weight"][POISON] = 0.0
        return tensors

    numbers = {}
    for i, row in enumerate(rows):
        # a loss that is not finite has no value to compare; that it is skipped is compared
        of_step = {f"{key} of step {i + 1}": np.array(float(x)) for key, x in row.items() if math.isfinite(float(x))}
        numbers |= of_step
    numbers |= {"step": np.array(float(state.step)), "adam_count": np.array(float(state.adam_count))}
    moments = {f"mu.{k}": x for k, x in clean(state.mu).items()} | {f"nu.{k}": x for k, x in clean(state.nu).items()}
    return {"numbers": numbers, "moments": moments, "update": update_of(clean(state.weights), clean(start.weights))}


ALLOWED = {"numbers": FLOAT64_ALLOWED, "moments": MOMENTS_ALLOWED, "update": UPDATE_ALLOWED}


def run_row(s: Settings, case: Case, item: str, seed: int) -> Row:
    """A run of a case on both sides and in the specification: the first kind of number that differs, or the worst that holds."""
    r = recipe(case, seed)
    state = (r.state.weights, r.state.mu, r.state.nu, r.state.step, r.state.adam_count)
    values, rows = spec_run.train(state, r.data.batch, r.until, r.cfg, r.opt, r.fields["document_separator"])

    def run(side) -> Outcome:
        kept: list[dict[str, float]] = []
        end = side.train(r.state, r.opt, r.data, r.until, lambda step, state, m: kept.append(dict(m)), **r.fields)
        return _outcome(case, r.state, end, kept)

    outcomes = on_both(s.sides("float64", r.cfg), run)
    expected = _outcome(case, r.state, TrainingState(*values), rows)
    found = []
    for kind, allowed in ALLOWED.items():
        # a single number is compared by itself: among others it would be measured against their norm
        groups = [{k: x} for k, x in expected[kind].items()] if kind == "numbers" else [expected[kind]]
        for group in groups:
            results = [{k: o[kind].get(k) for k in group} for o in outcomes]
            missing = lambda result: any(x is None for x in result.values())
            if any(map(missing, results)):
                side = verdict(missing(results[0]), missing(results[1]), True)
                found.append(Row("runs", item, "float64", math.inf, allowed, False, side, f"no {next(iter(group))}"))
                continue
            row = three_way(
                "runs", item, "float64", [*results, group], allowed, next(iter(group)) if len(group) == 1 else kind
            )
            found.append(row)
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
    "run": ("hidden", "head_dim", "rows", "length", "eps", "theta", "lr"),
    "text": ("family", "heads", "new"),
    "low": ("micro_batches", "chunks", "layers", "heads", "hidden", "head_dim", "rows", "length", "eps", "theta"),
}


def covering_cases(kind: str, full: bool) -> list[Case]:
    """Cases in which every pair of values meets. Unless `full`: of two values a feature and of all families, and any for the rest."""
    space = SPACES[kind]
    if full:
        return drawn.covering(space, fix)
    smaller = {name: x if name == "family" else x[:2] for name, x in space.items() if name not in UNPAIRED[kind]}
    rng = np.random.default_rng(25)
    # a kernel that takes a window by itself meets one only where no other mask is there
    alone = [{"family": x, "attention": "fused"} for x in ("llama", "mistral")] if kind == "low" else []
    rest = {name: values for name, values in space.items() if name not in smaller}
    simplest = {name: values[0] for name, values in space.items()}
    covered = [drawn.draw(rest, rng, lambda case: case) | case for case in drawn.covering(smaller, fix, tries=300)]
    return [simplest | case for case in alone] + covered


# One seed is judged, not a pool: a tensor's error may be this many times the largest of four that rounding makes in the
# specification, where every weight and intermediate result is moved by one ulp. Not one of some 40 drawn cases reached it.
LOW_FACTOR, MOVES = 4.0, 4


def low_row(s: Settings, case: Case, item: str, seed: int) -> Row:
    """Loss and gradients of both sides in a low precision, against what rounding explains."""
    cfg, dtype = config_of(case), case["dtype"]
    weights, parts = random_weights(cfg, seed, dtype), (case["micro_batches"], case["chunks"])
    ids, targets = random_batch(cfg, seed, case["micro_batches"] * case["rows"], case["length"])
    separator = (7, 11)[: case["separators"]] or None
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

    def shares_of(side) -> dict[str, float]:
        loss, grads = side.variant(remat=case["remat"], separator=separator).loss_and_grads(
            weights, ids, targets, *parts
        )
        found = errors({"loss": np.array(loss), **grads})
        return {k: e / ceiling[k] for k, e in found.items()}

    shares = on_both(dataclasses.replace(s, attention=case["attention"]).sides(dtype, cfg), shares_of)
    (jax_name, jax_share), (torch_name, torch_share) = worst(shares[0]), worst(shares[1])
    side = verdict(not jax_share <= 1, not torch_share <= 1, True)
    name = jax_name if jax_share >= torch_share else torch_name
    return Row("runs", item, dtype, max(jax_share, torch_share), 1.0, not side, side, name, name if side else "")


ROWS = {"run": run_row, "text": text_row, "low": low_row}


def case_row(s: Settings, kind: str, case: Case, item: str, seed: int) -> Row:
    """The row of a case; whatever a side raises is a failed row."""
    try:
        return ROWS[kind](s, case, item, seed)
    except Raised as error:
        return Row("runs", item, "", math.inf, 0, False, error.side, f"raised {error.note}")
    except Exception as error:
        return dataclasses.replace(crash("runs", error), item=item)


def explained(s: Settings, row: Row, kind: str, case: Case, seed: int) -> Row:
    """A row that fails, with its place: that of a trace of the smallest case that fails, or what that case cannot do without."""
    if row.ok:
        return row
    fails = lambda simpler: case_row(s, kind, simpler, row.item, seed).side == row.side
    small = drawn.shrink(case, SPACES[kind], fix, fails)
    features = drawn.needed(small, SPACES[kind])
    note = f"{row.note}; smallest: parity run --case '{kind} {seed} {drawn.to_line({f: small[f] for f in features})}'"
    row = dataclasses.replace(row, note=note)
    cfg = config_of(small)
    if (
        kind == "low"
    ):  # by rounding no module can be told from another: what the case needs, or the tensor that is worst
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


@contextlib.contextmanager
def quick_to_compile() -> Iterator[None]:
    """While this is open XLA leaves out what takes it longest; the optimised programs are judged by the other checks."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def check_runs(s: Settings) -> Iterator[Row]:
    """Runs and texts in which every pair of settings meets, and a few that are drawn anew by the seed."""
    if "float64" not in s.dtypes:
        return
    with quick_to_compile():
        yield from _run_rows(s)


class _Skipping:
    """Batches of which some overflow: one, none, then two in a row."""

    def __init__(self, cfg: ModelConfig, seed: int) -> None:
        self.cfg, self.seed = cfg, seed

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random_batch(self.cfg, self.seed + step, 2, 6, ignored=False)
        inputs[inputs == POISON] = POISON + 1
        if step in (0, 2, 3):
            inputs[0, 0] = POISON
        return inputs.astype(np.int32), targets.astype(np.int32)


def _skips_row(s: Settings) -> Row:
    """After how many steps runs end for skipped updates in a row, for limits of 1, 2 and 3, beside the specification."""
    cfg = config_of({name: values[0] for name, values in MODEL.items()})
    weights, data, opt = random_weights(cfg, s.seed), _Skipping(cfg, s.seed), OptimizerConfig(total_steps=6)
    weights["model.embed_tokens.weight"][POISON] = np.nan
    state = start_state(weights)

    def ended(run: Callable[[], Any]) -> str:
        try:
            run()
        except (UserError, ArithmeticError) as error:
            found = re.search(r"to step (\d+)", str(error))
            return found[1] if found else str(error)
        return "the end"

    of = lambda side: [
        ended(lambda n=n: side.train(state, opt, data, 6, max_skipped_steps=n, batch_size=2)) for n in (1, 2, 3)
    ]
    results = on_both(s.sides("float64", cfg), of)
    start = (state.weights, state.mu, state.nu, 0, 0)
    expected = [ended(lambda n=n: spec_run.train(start, data.batch, 6, cfg, opt, max_skipped=n)) for n in (1, 2, 3)]
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


def _run_rows(s: Settings) -> Iterator[Row]:
    yield _skips_row(s)
    for kind, space in SPACES.items():
        cases = covering_cases(kind, s.full)
        for i, case in enumerate(cases[:4] if s.quick else cases):
            row = case_row(s, kind, case, f"{kind} {i + 1} of {len(cases)}: {short(case, space)}", s.seed)
            yield explained(s, row, kind, case, s.seed)
    for i, (kind, space) in enumerate(SPACES.items()):
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
