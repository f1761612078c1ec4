"""Where two sides part: forward, backward and in the optimizer, at which named point, and whose fault it is.

Each side runs twice under the taps of `parity.sides.taps`. Running free shows how an error grows. Running with the
specification's values at every point judges each module alone: what reaches it, what it makes of identical inputs, what
flows back to it and what it hands back from an identical gradient. So a late error is not blamed on an early module,
nor an early one on a late.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_common.config import ModelConfig
from parity.core.compare import BOTH, FLOOR, JAX, SHARED, TORCH, Row, Tensors, round_to, tensor_error, tensor_errors
from parity.core.inputs import random_batch, random_weights
from parity.core.ops import input_name
from parity.sides.settings import Settings
from parity.sides.taps import Recorder
from parity.trace.optimizer_trace import OptimizerTrace, optimizer_fault, trace_optimizers
from parity.trace.points import Fault, Point, given, piece_values, positions, specification

# The error of one module given identical inputs, in units of the dtype's spacing at 1: a few roundings, and in float64
# and float32 those inside a matrix product (some sqrt(n) / 3 for n terms). Measured over 20 seeds of 5 shapes, see
# docs/tolerances.md.
LOCAL_UNITS = {"float64": 256.0, "float32": 16.0, "bfloat16": 4.0}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8}
WAYS = ("received", "output", "arriving", "leaving")


@dataclasses.dataclass(frozen=True)
class PointErrors:
    """The errors of one side at a point given identical inputs and gradients, and that of its output running free.

    Of the inputs it received, of its output, of the gradient arriving at its output and of the one leaving its inputs.
    NaN where the specification has none.
    """

    name: str
    received: float
    output: float
    arriving: float
    leaving: float
    free: float
    free_arriving: float
    which: str = ""  # the input that is wrong, if one is
    calls: int = 1
    detached: bool = False  # an input came without a way back for its gradient


@dataclasses.dataclass(frozen=True)
class SideTrace:
    side: str
    points: list[PointErrors]
    grads: dict[str, float]  # error of every weight's gradient, given identical inputs and gradients
    free_grads: dict[str, float]
    loss: float  # error of the loss, running free
    error: str = ""  # what the side raised, if it did


def relative(a: np.ndarray | None, b: np.ndarray, floor: float = 0.0) -> float:
    """||a - b|| / max(||b||, floor); infinite if a is missing, of another shape or not finite."""
    return tensor_error(a, b, max(float(np.linalg.norm(b)), floor, 1e-300))


def trace_side(
    side: Any, weights: Tensors, ids: np.ndarray, targets: np.ndarray, expected=None, alone: bool = True
) -> SideTrace:
    """One side free and given the specification's values; with `alone` False running free stands for both."""
    dtype = side.dtype
    points, loss, grads = expected or specification(weights, ids, targets, side.cfg, lambda x: round_to(x, dtype))
    forward, backward = given(points)
    runs: list[tuple[Recorder, float, Tensors]] = []
    try:
        for values in ((forward, backward), ({}, {})) if alone else (({}, {}),):
            runs.append(side.tapped(weights, ids, targets, *values))
    except Exception as error:  # a side that raises is a finding too
        return SideTrace(side.name, [], {}, {}, math.inf, f"{type(error).__name__}: {error}")
    (tapped, _, own_grads), (free, free_loss, free_grads) = runs[0], runs[-1]
    back_floor = FLOOR * max(float(np.linalg.norm(p.d_output)) for p in points if p.name != "loss")
    found = []
    for p in points:
        received = {
            input_name(p.name, i): relative(tapped.forward.get((p.name, f"in{i}")), x) for i, x in enumerate(p.inputs)
        }
        leaving = [relative(tapped.backward.get((p.name, f"in{i}")), x, back_floor) for i, x in enumerate(p.d_inputs)]
        which = max(received, key=received.__getitem__) if received else ""
        found.append(
            PointErrors(
                p.name,
                max(received.values(), default=math.nan),
                relative(tapped.forward.get((p.name, "out")), p.output),
                relative(tapped.backward.get((p.name, "out")), p.d_output, 0.0 if p.name == "loss" else back_floor),
                max(leaving, default=math.nan),
                relative(free.forward.get((p.name, "out")), p.output),
                relative(free.backward.get((p.name, "out")), p.d_output, back_floor),
                which,
                tapped.calls[p.name],
                any((p.name, f"in{i}") in tapped.detached for i in range(len(p.d_inputs))),
            )
        )
    loss_error = abs(free_loss - loss) / max(abs(loss), 1e-300)
    return SideTrace(side.name, found, tensor_errors(own_grads, grads), tensor_errors(free_grads, grads), loss_error)


def local_allowed(dtype: str) -> float:
    return LOCAL_UNITS[dtype] * EPS[dtype]


def fault(trace: SideTrace, allowed: float) -> Fault | None:
    """The first fault in the order of execution, then in the reverse order of the way back."""
    if trace.error:
        return Fault("the model", f"raised {trace.error}", math.inf)
    by_name = {p.name: p for p in trace.points}
    for p in trace.points:
        parent = by_name.get(_parent(p.name))
        if p.calls != 1:
            if parent is None or parent.calls == 1:  # else it is the parent that is not run, or run again
                return Fault(_parent(p.name), f"runs {p.name} {p.calls} times, not once", math.inf)
            continue
        if p.received > allowed:
            where = "rotary table" if p.which in ("cos", "sin") else _parent(p.name)
            return Fault(where, f"what reaches {p.name} ({p.which})", p.received)
        if p.output > allowed:
            return Fault(p.name, "given identical inputs", p.output)
    for p, what in _way_back(trace.points):
        if what == "arriving" and p.arriving > allowed:
            return Fault(_parent(p.name), f"in the gradient that flows back to {p.name}", p.arriving)
        if what == "leaving" and p.leaving > allowed:
            if p.detached:
                parent = by_name.get(_parent(p.name))
                if parent is not None and parent.detached:  # its own input came without a way back
                    continue
                return Fault(_parent(p.name), f"no gradient flows back from {p.name}", p.leaving)
            return Fault(p.name, "in the gradient it hands back, given identical inputs", p.leaving)
    name = max(trace.grads, key=trace.grads.__getitem__)
    if trace.grads[name] > allowed:
        return Fault(name, "in the gradient of the weight, given identical inputs", trace.grads[name])
    return None


def _way_back(points: list[PointErrors]) -> Iterator[tuple[PointErrors, str]]:
    """The points in the order of the backward pass: a module hands its gradient back after all that it holds."""
    waiting: list[PointErrors] = []
    for p in reversed(points):
        while waiting and not p.name.startswith(waiting[-1].name + "."):
            yield waiting.pop(), "leaving"
        yield p, "arriving"
        waiting.append(p)
    while waiting:
        yield waiting.pop(), "leaving"


def _parent(name: str) -> str:
    """The module that holds a point."""
    return name.rpartition(".")[0].removesuffix(".layers") or "the model"


@dataclasses.dataclass(frozen=True)
class Trace:
    cfg: ModelConfig
    dtype: str
    sides: tuple[SideTrace, SideTrace]
    optimizers: tuple[OptimizerTrace, ...] = ()

    @property
    def allowed(self) -> float:
        return local_allowed(self.dtype)

    def faults(self) -> tuple[Fault | None, Fault | None]:
        """The first fault of JAX and of torch, if they have one: in the model, else in the optimizer."""
        found = []
        for k, side in enumerate(self.sides):
            first = fault(side, self.allowed)
            if first is None and self.optimizers:
                first = optimizer_fault(self.optimizers[k])
            found.append(first)
        return found[0], found[1]

    def side(self) -> str:
        jax, torch = self.faults()
        if jax and torch:
            return SHARED if jax.place == torch.place and _close(jax.error, torch.error) else BOTH
        return JAX if jax else TORCH if torch else ""

    def place(self) -> str:
        jax, torch = self.faults()
        first = jax or torch
        return "" if first is None else first.place

    def sentence(self) -> str:
        """The verdict."""
        jax, torch = self.faults()
        worst = [max(own_errors(side), default=math.inf) for side in self.sides]
        says = lambda k: (
            f"agrees with the specification to {worst[k]:.0e}" if self.sides[k].points else "was not traced"
        )
        agrees = lambda k: f"{('JAX', 'torch')[k]} {says(k)}"
        if jax is None and torch is None:
            return f"No difference: given identical inputs, {agrees(0)} and torch to {worst[1]:.0e} at every point."
        describe = lambda f: f"{f.place}: {f.error:.1e} {f.what}"
        if jax and torch:
            if self.side() == SHARED:
                return f"JAX and torch alike differ from the specification first at {describe(jax)}."
            return f"JAX differs first at {describe(jax)}; torch at {describe(torch)}."
        if jax:
            return f"JAX differs first at {describe(jax)}; {agrees(1)}."
        assert torch is not None
        return f"torch differs first at {describe(torch)}; {agrees(0)}."


def _close(a: float, b: float) -> bool:
    return a == b or 0.5 < a / b < 2.0


def own_errors(side: SideTrace) -> list[float]:
    return [x for p in side.points for x in (p.received, p.output, p.arriving, p.leaving) if not math.isnan(x)]


def located(row: Row, s: Settings, cfg: ModelConfig | None = None, separator: Any = None) -> Row:
    """A row that fails, with the place where its side differs first, found by a trace on the same weights and
    tokens.
    """
    if row.ok:
        return row
    only = row.side if s.blamed_only and row.side in (JAX, TORCH) else ""
    found = trace(s, cfg, optimizer=row.check == "adamw", only=only, separator=separator)
    place = found.place()
    if not place:  # the pass without gradients may take another way, which cached decoding takes too
        other = trace_cache(dataclasses.replace(row, place=""), dataclasses.replace(s, cfg=cfg or s.cfg))
        if other.place:
            return dataclasses.replace(other, note=f"without gradients {other.note}")
        note = "uncompiled and with gradients no module differs: only the compiled program does"
        return dataclasses.replace(row, note=f"{row.note}; {note}")
    # positions and masks of documents reach modules that are right without them
    if separator is not None and not trace(s, cfg, optimizer=False, only=only).place():
        place = "inside_documents"
    return dataclasses.replace(row, place=place, note=found.sentence())


def located_or(row: Row, s: Settings, cfg: ModelConfig | None, otherwise: str, separator: Any = None) -> Row:
    """`located`, and where no module differs the function that a row is about, not the tensor that showed it."""
    if row.ok:
        return row
    found = located(dataclasses.replace(row, place=""), s, cfg, separator)
    return found if found.place else dataclasses.replace(found, place=otherwise)


def trace(
    s: Settings,
    cfg: ModelConfig | None = None,
    dtype: str = "float64",
    optimizer: bool = True,
    alone: bool = True,
    only: str = "",
    separator: Any = None,
) -> Trace:
    """Both sides of a config, traced on random weights and tokens of the settings. alone: see `trace_side`.

    only: the one side to trace, the other's points then stay empty. separator: of documents that must not see each
    other.
    """
    cfg = cfg or s.cfg
    weights = random_weights(cfg, s.seed, dtype)
    ids, targets = random_batch(cfg, s.seed, s.batch, s.length)
    if separator is not None:  # documents of a few tokens each
        rng, ends = np.random.default_rng((s.seed, 24)), np.atleast_1d(separator)
        ids = np.where(rng.random(ids.shape) < 0.2, rng.choice(ends, ids.shape), ids)
    expected = specification(weights, ids, targets, cfg, lambda x: round_to(x, dtype), separator)
    sides = s.sides(dtype, cfg)
    sides = sides if separator is None else tuple(side.variant(separator=separator) for side in sides)
    traced = lambda side: trace_side(side, weights, ids, targets, expected, alone)
    empty = lambda side: SideTrace(side.name, [], {"": 0.0}, {}, 0.0)
    traces = tuple((traced if only in ("", side.name) else empty)(side) for side in sides)
    steps = tuple(trace_optimizers(s, cfg)) if optimizer and dtype == "float64" else ()
    return Trace(cfg, dtype, (traces[0], traces[1]), steps)


# --- cached decoding


def trace_cache(row: Row, s: Settings) -> Row:
    """A row of cached decoding that fails, with the first point at which a piece of the sequence differs.

    The sequence is fed as `cached_logits` feeds it; a point's values are the specification's at the piece's positions.
    Inputs and outputs are those of the specification, but for the keys and values that attention reads, which are the
    cache's.
    """
    weights = random_weights(s.cfg, s.seed)
    ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
    points, _, _ = specification(weights, ids, targets, s.cfg)
    prompt = max(1, ids.shape[1] // 3)
    places: list[str] = []
    notes = []
    for side in s.sides("float64"):
        try:
            found = _cache_fault(side, weights, ids, prompt, points)
        except Exception as error:
            found = Fault("kv_cache", f"raised {type(error).__name__}: {error}", math.inf)
        if found is not None:
            places.append(found.place)
            notes.append(f"{side.name} differs first at {found.place}: {found.error:.1e} {found.what}")
    if not places:
        return row
    return dataclasses.replace(row, place=places[0], note="; ".join(notes))


def _cache_fault(side: Any, weights: Tensors, ids: np.ndarray, prompt: int, points: list[Point]) -> Fault | None:
    allowed = local_allowed("float64")
    for recorder, start, end in side.tapped_cache(weights, ids, prompt, lambda a, b: piece_values(points, a, b)):
        for p in points:
            if p.name == "loss":
                break
            if recorder.calls[p.name] != 1:
                return Fault(_parent(p.name), f"runs {p.name} {recorder.calls[p.name]} times, not once", math.inf)
            for i, x in enumerate(p.inputs):
                name = input_name(p.name, i)
                got = recorder.forward.get((p.name, f"in{i}"))
                if name in ("cos", "sin") and got is not None and got.ndim == 3:
                    got = got[0]  # a table for each text; they are as long as each other
                cached = p.name.endswith(".attention") and i > 0
                wanted = x[:, :end] if cached else positions(x, start, end)
                error = relative(got[:, :end] if cached and got is not None else got, wanted)
                if error > allowed:
                    where = "rotary table" if name in ("cos", "sin") else "kv_cache" if cached else p.name
                    return Fault(where, f"in what reaches {p.name} ({name}), positions {start} to {end - 1}", error)
            error = relative(recorder.forward.get((p.name, "out")), positions(p.output, start, end))
            if error > allowed:
                return Fault(p.name, f"in positions {start} to {end - 1}, given the right keys and values", error)
    return None
