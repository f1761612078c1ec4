"""Is the candidate the same program as the reference? Outputs, gradients and state, by the reference's own rounding.

    from parity.judge import judge

    verdict = judge(reference=(linen_module, variables), candidate=torch_module, inputs=[x])
    print(verdict.text())

Neither is changed. Both get the same weights and inputs: those given, then with constants filled (a gate that starts at
zero hides what is behind it), then with inputs drawn anew, small and large. What may differ is measured on the
reference alone. A verdict of `same` says what it did not cover.
"""

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError, counted, first_line
from parity.judge import trees
from parity.judge.allowance import EPS, allowance, error, errors, moved
from parity.judge.alternatives import settle
from parity.judge.layouts import Layout, found_layout, read_layout
from parity.judge.maps import Arrays, Map
from parity.judge.matching import Matching, match
from parity.judge.results import named, paired
from parity.judge.sides import MODES, Call, Result, Side, side_of
from parity.judge.verdict import Figure, Place, Verdict

DTYPES = ("float64", "float32")
NUDGES = 3
NARROW_TO = "float32"
SIMPLE = 64  # a buffer of whole numbers up to this was not rounded


@dataclass
class Setup:
    """Two sides, what belongs together, and how they are called."""

    reference: Side
    candidate: Side
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    matching: Matching
    states: Matching
    layout: Layout
    parameters: Arrays  # the reference's
    state: Arrays
    seed: int
    figures: list[Figure] = field(default_factory=list)
    not_covered: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keep: np.ndarray | None = None  # of outputs: which positions count
    cases: dict[str, tuple[Arrays, Arrays, Any, Any]] = field(default_factory=dict)  # the draws that were judged
    precision: str = "float64"  # the dtype whose rounding counts in the widest run
    same_paths: bool = False  # whether outputs have the same names on both sides, in any order
    given_weights: bool = False  # whether the weights are compared as they are
    reached: set[str] = field(default_factory=set)  # parameters that a gradient reached

    def cover(self, text: str) -> None:
        """Say once what is not covered."""
        self.not_covered[text] = None

    def cotangent(self, side: str) -> Callable[[int, str, tuple[int, ...]], np.ndarray]:
        """A fixed random direction of each output, laid out as the side has it."""

        def of(i: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
            mine = self.layout.of_output(shape, back=True) if side == "candidate" else shape
            which = [*path.encode()] if self.same_paths else [i]
            drawn = np.random.default_rng((self.seed, 3, *which)).standard_normal(mine)
            if self.keep is not None and drawn.shape[: self.keep.ndim] == self.keep.shape:
                drawn = drawn * self.keep.reshape(self.keep.shape + (1,) * (drawn.ndim - self.keep.ndim))
            return self.layout.output(drawn, shape) if side == "candidate" else drawn

        return of

    def __post_init__(self) -> None:
        self.cotangents = {side: self.cotangent(side) for side in ("reference", "candidate")}

    def run(
        self, side: str, parameters: Arrays, state: Arrays, dtype: str, mode: str, gradients: bool = True
    ) -> Result:
        """One side with the reference's weights and state."""
        cotangent = self.cotangents[side] if gradients else None
        if side == "reference":
            return self.reference.run(parameters, state, Call(self.args, self.kwargs, dtype, mode, cotangent))
        args, kwargs = self.layout.inputs(self.args, self.kwargs)
        call = Call(args, kwargs, dtype, mode, cotangent, self.layout)
        return self.candidate.run(self.mapped(parameters), self.mapped_state(state), call)

    def shapes(self, side: str, dtype: str, mode: str) -> list[tuple[str, tuple[int, ...]]]:
        """The shapes of a side's outputs; of JAX without computing anything."""
        if side == "reference":
            call = Call(self.args, self.kwargs, dtype, mode)
            return self.reference.shapes(self.parameters, self.state, call)
        args, kwargs = self.layout.inputs(self.args, self.kwargs)
        call = Call(args, kwargs, dtype, mode)
        return self.candidate.shapes(self.mapped(self.parameters), self.mapped_state(self.state), call)

    def kept(self, x: np.ndarray) -> np.ndarray:
        """The positions of an output that count."""
        if self.keep is None or x.shape[: self.keep.ndim] != self.keep.shape:
            return x
        return x[self.keep]

    def mapped(self, parameters: Arrays) -> Arrays:
        """The candidate's parameters; what has no partner keeps its own."""
        return {**self.candidate.parameters, **{name: made(parameters) for name, made in self.matching.maps.items()}}

    def mapped_state(self, state: Arrays) -> Arrays:
        return {**self.candidate.state, **{name: made(state) for name, made in self.states.maps.items()}}


def judge(
    reference: Any,
    candidate: Any,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    mode: str | Sequence[str] = "eval",
    layout: str | None = None,
    names: Mapping[str, Any] | None = None,
    state_names: Mapping[str, Any] | None = None,
    weights: str = "reference",
    dtypes: Sequence[str] = DTYPES,
    mask: np.ndarray | None = None,
    seed: int = 0,
    name: str = "candidate",
) -> Verdict:
    """Compare two implementations.

    reference, candidate: a torch, NNX, Equinox or Keras module; (Linen module, variables), (Haiku, params), (function,
    weights), or a `Side`. inputs: positional ones as a list, keywords as a dict, or (list, dict); nests of NumPy
    arrays. mode: "eval", "train" or both: dropout then draws the same on both sides, and statistics are compared after
    the run. layout: as "NHWC->NCHW", of inputs and outputs with as many axes; found if it is not given. names,
    state_names: candidate's tensor -> path of the reference's leaf, `Map`, or function of the leaves. weights:
    "reference" gives its weights to the candidate, "candidate" the other way, "given" compares them as they are. mask:
    bool, over the first axes of every output, True where it counts. Raises UserError for what cannot be judged at all.
    """
    start = time.perf_counter()
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    for given in modes:
        if given not in MODES:
            raise UserError(f"mode = {given!r} must be 'eval' or 'train'")
    if weights not in ("reference", "candidate", "given"):
        raise UserError(f"weights = {weights!r} must be 'reference', 'candidate' or 'given'")
    for dtype in dtypes:
        if dtype not in EPS:
            raise UserError(f"dtype {dtype!r} is not known; known: {', '.join(EPS)}")
    ours, theirs = side_of(reference), side_of(candidate)
    args, kwargs = _inputs(inputs)
    matching = match(theirs.parameters, ours.parameters, names)
    states = match(theirs.state, ours.state, state_names)
    setup = Setup(
        ours, theirs, args, kwargs, matching, states, read_layout(layout), dict(ours.parameters), dict(ours.state), seed
    )
    setup.given_weights = weights == "given"
    setup.keep = None if mask is None else np.asarray(mask, bool)
    _parameters(setup, weights)
    place = Place()
    try:
        _start(setup, modes[0], layout is not None)
        settle(setup, modes[0], dtypes[0])
        for one in modes:
            _compare(setup, one, tuple(dtypes))
    except _Raised as raised:
        setup.figures.append(raised.figure)
    if any(not figure.ok for figure in setup.figures):
        place = _place(setup, modes, tuple(dtypes))
    return Verdict(
        name,
        setup.figures,
        list(setup.not_covered),
        matching,
        states,
        place,
        setup.notes,
        _versions(),
        seed,
        time.perf_counter() - start,
    )


class _Raised(Exception):
    def __init__(self, figure: Figure) -> None:
        super().__init__(str(figure))
        self.figure = figure


def _inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif (
        isinstance(inputs, tuple)
        and len(inputs) == 2
        and isinstance(inputs[1], Mapping)
        and isinstance(inputs[0], list)
    ):
        args, kwargs = tuple(inputs[0]), dict(inputs[1])
    elif isinstance(inputs, (list, tuple)):
        args, kwargs = tuple(inputs), {}
    else:
        raise UserError(
            f"inputs = {type(inputs).__name__}: a list of positional inputs or a dict of named ones is needed"
        )
    to_numpy = lambda x: np.asarray(x) if hasattr(x, "__array__") and not isinstance(x, np.ndarray) else x
    return tuple(trees.mapped(to_numpy, list(args))), trees.mapped(to_numpy, kwargs)


# --- before the runs


def _parameters(setup: Setup, weights: str) -> None:
    """What has no partner, and weights that go the other way."""
    for what, m, ours, theirs in (
        ("parameters", setup.matching, setup.reference.parameters, setup.candidate.parameters),
        ("state", setup.states, setup.reference.state, setup.candidate.state),
    ):
        if what == "state":  # a table that is made once stands in one framework's buffers, and nowhere in the other's
            for name in m.missing:
                setup.notes.append(f"buffer {name} of the candidate has no partner and keeps its own values")
            for name in m.unused:
                setup.cover(f"state {name} of the reference, which has no partner")
            continue
        for name, why in m.missing.items():
            setup.figures.append(Figure(what, name, math.inf, 0.0, hint=why))
        for leaf in m.unused:
            setup.figures.append(Figure(what, leaf, math.inf, 0.0, hint="no tensor of the candidate is made of it"))
        if not m.missing and not m.unused:
            setup.figures.append(Figure(what, f"{counted(len(theirs), 'tensor')} matched", 0.0, 0.0))
        if weights == "given":
            for name, made in m.maps.items():
                off = error(np.asarray(made(ours)), theirs[name])
                setup.figures.append(Figure(what, name, off, EPS["float32"], hint="the weights that were given"))
        if weights == "candidate":
            leaves = {leaf: x.copy() for leaf, x in setup.parameters.items()}
            for name, made in sorted(
                m.maps.items(), key=lambda item: any(x.beside for x in getattr(item[1], "parts", ()))
            ):
                if not isinstance(made, Map):
                    raise UserError(
                        f"weights = 'candidate': the function for {name!r} goes one way; give a Map instead"
                    )
                made.put(leaves, theirs[name])
            setup.parameters = leaves
            state = {leaf: x.copy() for leaf, x in setup.state.items()}
            for name, made in setup.states.maps.items():
                if isinstance(made, Map):
                    made.put(state, setup.candidate.state[name])
            setup.state = state


def _start(setup: Setup, mode: str, given: bool) -> None:
    """Both sides run once, forward; a layout is looked for if the candidate cannot, or gives other shapes."""
    try:
        ours = setup.shapes("reference", "float32", mode)
    except UserError:
        raise
    except Exception as error:  # whatever somebody's model raises
        raise UserError(f"the reference cannot run on these inputs: {_said(error)}") from error
    tried: list[Layout] = [setup.layout] if given else [setup.layout, *found_layout(setup.args, setup.kwargs)]
    raised: Exception | None = None
    running: Layout | None = None
    for layout in tried:
        setup.layout = layout
        try:
            theirs = setup.shapes("candidate", "float32", mode)
        except Exception as error:  # whatever somebody's model raises
            raised = raised or error
            continue
        running = running or layout
        setup.same_paths = dict(ours).keys() == dict(theirs).keys() and len(dict(ours)) == len(ours)
        if layout.fits(ours, theirs):
            if layout.text and not given:
                setup.notes.append(f"layout {layout.text} was found, say otherwise with layout=")
            return
    setup.layout = running or tried[0]
    if running is None and raised is not None:
        figure = Figure("run", "the candidate", math.inf, 0.0, mode=mode, side="candidate", hint=_said(raised))
        raise _Raised(figure) from raised


def _said(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    mine = str(Path(__file__).parent)
    own = [frame for frame in frames if not frame.filename.startswith(mine) and "site-packages" not in frame.filename]
    where = f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


# --- the runs


def _compare(setup: Setup, mode: str, dtypes: tuple[str, ...]) -> None:
    dtypes = _dtypes_that_run(setup, mode, dtypes)
    if not dtypes:
        return
    precision = setup.precision = _precision(setup, dtypes[0], mode)
    rng = np.random.default_rng((setup.seed, 7))
    for draw, parameters, state, args, kwargs in _draws(setup, rng):
        given = setup.args, setup.kwargs
        setup.args, setup.kwargs = args, kwargs
        setup.cases[draw] = parameters, state, args, kwargs
        try:
            truth = _judge_in(setup, dtypes[0], precision, mode, draw, parameters, state, None)
            for dtype in dtypes[1:] if draw == GIVEN else ():
                _judge_in(setup, dtype, dtype, mode, draw, parameters, state, truth)
        finally:
            setup.args, setup.kwargs = given
    for name in setup.matching.maps:
        if setup.reached and name not in setup.reached and name not in setup.candidate.frozen:
            setup.cover(f"parameter {name}: no gradient reaches it on either side ({mode} mode)")
    for name in setup.candidate.frozen:
        setup.cover(f"gradient of {name}, which is frozen in the candidate")


def _dtypes_that_run(setup: Setup, mode: str, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Those dtypes in which the reference runs: a carry that is made in float32 stops a scan in float64."""
    found = []
    for dtype in dtypes:
        try:
            setup.shapes("reference", dtype, mode)
            found.append(dtype)
        except Exception as error:
            setup.cover(f"{dtype}: the reference cannot run in it ({_said(error)})")
    return tuple(found)


def _precision(setup: Setup, dtype: str, mode: str) -> str:
    """The dtype whose rounding counts: a narrower one if a side computes in it whatever it is given."""
    if dtype != "float64":
        return dtype
    found = {}
    args, kwargs = setup.layout.inputs(setup.args, setup.kwargs)
    for who, side, call, weights in (
        ("reference", setup.reference, Call(setup.args, setup.kwargs, dtype, mode), (setup.parameters, setup.state)),
        (
            "candidate",
            setup.candidate,
            Call(args, kwargs, dtype, mode),
            (setup.mapped(setup.parameters), setup.mapped_state(setup.state)),
        ),
    ):
        try:
            narrow = side.narrow(*weights, call)
        except Exception:  # who cannot run is told of elsewhere
            narrow = []
        if narrow:
            found[who] = (
                f"the {who} computes in float32 in {', '.join(narrow[:4])}{' and more' if len(narrow) > 4 else ''}"
            )
    tables = [n for n in setup.states.missing if _rounded(setup.candidate.state[n]) and _matters(setup, n, dtype, mode)]
    tables += [name for name in setup.states.unused if _rounded(setup.reference.state[name])]
    if tables:
        found["tables"] = f"{', '.join(tables[:3])} was made in float32"
    if found:
        setup.cover(f"float64: {'; '.join(found.values())}, so float32's rounding is allowed")
        return NARROW_TO
    return dtype


def _matters(setup: Setup, name: str, dtype: str, mode: str) -> bool:
    """Whether the candidate's outputs depend on a buffer."""
    kept = setup.candidate.state[name]
    try:
        before = setup.run("candidate", setup.parameters, setup.state, dtype, mode, gradients=False)
        setup.candidate.state[name] = kept * 1.01 + 0.01
        after = setup.run("candidate", setup.parameters, setup.state, dtype, mode, gradients=False)
    finally:
        setup.candidate.state[name] = kept
    return any(not np.array_equal(x, y, equal_nan=True) for _, x, y in paired(before.outputs, after.outputs) or ())


def _rounded(x: np.ndarray) -> bool:
    """Whether a table shows that it was computed in float32."""
    plain = np.all(x == np.round(x)) and np.abs(x[np.isfinite(x)]).max(initial=0) <= SIMPLE
    return not plain and bool(np.array_equal(x.astype(np.float32).astype(np.float64), x, equal_nan=True))


GIVEN, FILLED = "as given", "constants filled"


def _draws(setup: Setup, rng: np.random.Generator):
    """(name, parameters, state, args, kwargs) of every case."""
    yield GIVEN, setup.parameters, setup.state, setup.args, setup.kwargs
    filled = {name: _filled(x, rng) for name, x in setup.parameters.items()}
    state = {name: _filled_state(x, rng) for name, x in setup.state.items()}
    if any(filled[name] is not x for name, x in setup.parameters.items()) or any(
        state[n] is not x for n, x in setup.state.items()
    ):
        yield FILLED, filled, state, setup.args, setup.kwargs
    for path, x in trees.leaves(setup.args) + trees.leaves(setup.kwargs):
        if not _is_drawn_float(x) and _drawn(x, 1.0, np.random.default_rng(0)) is x:
            setup.cover(f"input {path}: only ever as it was given")
    for scale in (1.0, 1e-2, 30.0):
        drawn = lambda x, scale=scale: _drawn(x, scale, rng)
        args, kwargs = tuple(trees.mapped(drawn, list(setup.args))), trees.mapped(drawn, setup.kwargs)
        if scale != 1.0 and not any(_is_drawn_float(x) for _, x in trees.leaves(args) + trees.leaves(kwargs)):
            continue
        yield f"inputs drawn, scale {scale:g}", filled, state, args, kwargs


def _filled(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values of their own for a tensor that is all zeros or all ones, and might hide something."""
    if x.size == 0 or np.any(x != x.reshape(-1)[0]):
        return x
    value = x.reshape(-1)[0]
    return value + rng.standard_normal(x.shape) * (0.1 if value == 0 else 0.2 * abs(value))


def _filled_state(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if x.size == 0 or np.any(x != x.reshape(-1)[0]):
        return x
    return rng.uniform(0.5, 1.5, x.shape) if x.reshape(-1)[0] == 1 else x + 0.1 * rng.standard_normal(x.shape)


def _is_drawn_float(x: Any) -> bool:
    """Whether an input is of real numbers that may be others: a mask of zeros, ones and infinities may not."""
    if not isinstance(x, np.ndarray) or not (trees.is_float(x) or trees.is_complex(x)):
        return False
    values = trees.exact(x)
    return bool(np.all(np.isfinite(values))) and not np.all(np.isin(values, (0.0, 1.0)))


def _drawn(x: Any, scale: float, rng: np.random.Generator) -> Any:
    if _is_drawn_float(x):
        drawn = rng.standard_normal(x.shape)
        drawn = drawn + 1j * rng.standard_normal(x.shape) if trees.is_complex(x) else drawn
        return (scale * drawn).astype(x.dtype)
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and x.size > 1:
        low, high = int(x.min()), int(x.max())
        return rng.integers(low, high + 1, x.shape).astype(x.dtype) if not _counts_up(x) else x
    return x


def _counts_up(x: np.ndarray) -> bool:
    """Positions are no ids: they stay."""
    return bool(np.all(np.diff(x, axis=-1) == 1)) if x.ndim and x.shape[-1] > 1 else False


def _judge_in(
    setup: Setup,
    dtype: str,
    precision: str,
    mode: str,
    draw: str,
    parameters: Arrays,
    state: Arrays,
    truth: Result | None,
) -> Result | None:
    """Figures of one dtype and one draw. truth: the reference in float64, by which both are judged in a narrower dtype.
    Returns the reference's result, or None where the draw cannot be judged.
    """
    try:
        ours = setup.run("reference", parameters, state, dtype, mode)
        gradients = True
    except Exception as raised:  # a loop without a gradient, for one
        try:
            ours, gradients = setup.run("reference", parameters, state, dtype, mode, gradients=False), False
            setup.cover(f"gradients: the reference has none ({_said(raised)})")
        except Exception as again:
            if draw == GIVEN:
                setup.cover(f"{dtype}: the reference cannot run in it ({_said(again)})")
            return None
    if draw != GIVEN and not all(np.isfinite(x).any() for _, x in ours.outputs if _is_number(x) and x.size):
        setup.cover(f"{draw}: the reference gives no finite number there")
        return None
    try:
        theirs = setup.run("candidate", parameters, state, dtype, mode, gradients)
    except Exception as raised:
        hint = f"{_said(raised)}; the reference runs"
        raise _Raised(
            Figure("run", "the candidate", math.inf, 0.0, dtype, draw, mode, side="candidate", hint=hint)
        ) from raised
    if draw == GIVEN and truth is None:
        again = setup.run("candidate", parameters, state, dtype, mode, gradients)
        same = paired(theirs.outputs, again.outputs) or ()
        if any(not np.array_equal(x, y, equal_nan=True) for _, x, y in same):
            where: dict[str, Any] = {"dtype": dtype, "draw": draw, "mode": mode, "side": "candidate"}
            hint = "two runs of it on the same inputs differ"
            setup.figures.append(Figure("run", "the candidate", math.inf, 0.0, **where, hint=hint))
    rng = np.random.default_rng((setup.seed, 9))
    nudges = NUDGES if draw == GIVEN else 1
    nudged = [_nudged(setup, precision, dtype, mode, parameters, state, rng, gradients) for _ in range(nudges)]
    common = {"dtype": dtype, "draw": draw, "mode": mode}
    runs = _Runs(ours, theirs, [x for x in nudged if x], truth, precision, common)
    _outputs(setup, runs)
    if gradients:
        _gradients(setup, runs)
    if setup.states.maps or mode == "train":
        _state(setup, runs, state)
    return ours


@dataclass(frozen=True)
class _Runs:
    """The runs of one case in one dtype."""

    ours: Result
    theirs: Result
    nudged: list[Result]  # the reference's, with one ulp moved
    truth: Result | None  # the reference's in float64, if this is a narrower dtype
    precision: str
    common: dict[str, Any]  # what all figures of the case say


def _is_number(x: np.ndarray) -> bool:
    return np.issubdtype(x.dtype, np.inexact)


def _nudged(
    setup: Setup, precision: str, dtype: str, mode: str, parameters: Arrays, state: Arrays, rng, gradients: bool
) -> Result | None:
    """The reference with every weight, statistic and input moved by one ulp."""
    move = lambda x: (
        moved(trees.exact(x), precision, rng)
        if isinstance(x, np.ndarray) and (trees.is_float(x) or trees.is_complex(x))
        else x
    )
    given = setup.args, setup.kwargs
    setup.args, setup.kwargs = tuple(trees.mapped(move, list(given[0]))), trees.mapped(move, given[1])
    try:
        return setup.run(
            "reference",
            {n: move(x) for n, x in parameters.items()},
            {n: move(x) for n, x in state.items()},
            dtype,
            mode,
            gradients,
        )
    except Exception:
        return None
    finally:
        setup.args, setup.kwargs = given


def _outputs(setup: Setup, runs: _Runs) -> None:
    ours, theirs, common = runs.ours, runs.theirs, runs.common
    pairs = paired(ours.outputs, theirs.outputs)
    if pairs is None:
        hint = f"the reference gives {_shapes(ours.outputs)}, the candidate {_shapes(theirs.outputs)}"
        setup.figures.append(Figure("outputs", "number of outputs", math.inf, 0.0, **common, hint=hint))
        return
    ours_by, theirs_by = {}, {}
    for path, a, b in pairs:
        turned = setup.layout.output(b, a.shape, back=True)
        same_shape = turned.shape == a.shape
        ours_by[path], theirs_by[path] = (setup.kept(a), setup.kept(turned)) if same_shape else (a, turned)
    numbers = {path: x for path, x in ours_by.items() if _is_number(x)}
    if not ours_by:
        setup.cover("outputs: there is none")
    for path, a in ours_by.items():
        b = theirs_by[path]
        if a.shape != b.shape:
            hint = f"the reference's shape is {a.shape}, the candidate's {b.shape}"
            setup.figures.append(Figure("outputs", path, math.inf, 0.0, **common, hint=hint))
        elif _is_number(a) != _is_number(b):
            hint = f"the reference gives {a.dtype.kind}, the candidate {b.dtype.kind} (i: whole numbers, f: real ones)"
            setup.figures.append(Figure("outputs", path, math.inf, 0.0, **common, hint=hint))
        elif not _is_number(a):
            off = int((a != b).sum())
            setup.figures.append(
                Figure("outputs", path, off, 0.0, **common, hint=f"elements of {a.size}" if off else "")
            )
        elif not np.isfinite(a).all() and common["draw"] == GIVEN:
            bad = int((~np.isfinite(a)).sum())
            setup.cover(f"outputs: {bad} of {a.size} numbers of {path} are not finite in the reference")
    of = lambda result: {path: setup.kept(x) for path, x in named(result.outputs)}
    # what holds no finite number on the reference's side shows nothing of the candidate
    tells = lambda path, x: np.isfinite(x).any() or not np.array_equal(x, theirs_by[path], equal_nan=True)
    same = {path: x for path, x in numbers.items() if theirs_by[path].shape == x.shape and tells(path, x)}
    _judge_tensors(setup, runs, "outputs", same, theirs_by, of)


def _shapes(outputs: list[tuple[str, np.ndarray]]) -> str:
    return f"{counted(len(outputs), 'output')} {', '.join(str(x.shape) for _, x in outputs[:6])}"


def _gradients(setup: Setup, runs: _Runs) -> None:
    ours, theirs = runs.ours, runs.theirs
    mapped = lambda result: {
        name: made.gradient(result.gradients) for name, made in setup.matching.maps.items() if name in theirs.gradients
    }
    grads = mapped(ours)
    others = {name: theirs.gradients[name] for name in grads}
    setup.reached |= {name for name, x in grads.items() if x.any() or others[name].any()}
    _judge_tensors(setup, runs, "gradients", grads, others, mapped, kinds=True)
    of = lambda result: {f"input {path}": x for path, x in result.input_gradients.items()}
    turned = {f"input {path}": setup.layout.input(x, back=True) for path, x in theirs.input_gradients.items()}
    same = {name: x for name, x in of(ours).items() if name in turned}
    _judge_tensors(setup, runs, "gradients", same, turned, of, kinds=True)


def _state(setup: Setup, runs: _Runs, before: Arrays) -> None:
    """Statistics after the run."""
    mapped = lambda result: {name: np.asarray(made(result.state)) for name, made in setup.states.maps.items()}
    _judge_tensors(setup, runs, "state", mapped(runs.ours), runs.theirs.state, mapped)
    start = setup.mapped_state(before)
    for name in setup.states.missing:
        if not np.array_equal(runs.theirs.state[name], start[name], equal_nan=True):
            setup.cover(f"state {name} of the candidate, which a run changes and which has no partner")


def _judge_tensors(
    setup: Setup,
    runs: _Runs,
    check: str,
    ours: Arrays,
    theirs: Mapping[str, np.ndarray],
    of: Callable[[Result], Arrays],
    kinds: bool = False,
) -> None:
    """One figure for each tensor of `ours`: by the reference's own result, or by its float64 result if that is known.

    of: the tensors of any run of the reference. kinds: as of `errors`.
    """
    if not ours:
        return
    true = {} if runs.truth is None else of(runs.truth)
    by = {name: true[name] if name in true and true[name].shape == x.shape else x for name, x in ours.items()}
    noise = [errors(of(x), ours, kinds) for x in runs.nudged]
    own = errors(ours, by, kinds) if true else {}
    bound = allowance(runs.precision, noise, own, ours)
    for name, off in errors({name: theirs[name] for name in ours if name in theirs}, by, kinds).items():
        if math.isnan(bound.allowed[name]):
            where = f"{runs.common['dtype']}, {runs.common['draw']}"
            setup.cover(f"{check}: {name} ({where}): rounding alone changes it by {bound.noise[name]:.0e}")
            continue
        setup.figures.append(Figure(check, name, off, bound.allowed[name], **runs.common, noise=bound.noise[name]))


# --- after the runs


def _place(setup: Setup, modes: tuple[str, ...], dtypes: tuple[str, ...]) -> Place:
    bad = [figure for figure in setup.figures if not figure.ok]
    ran = [figure for figure in bad if figure.check in ("outputs", "gradients", "state")]
    if not ran:
        return Place(bad[0].tensor, "tensor", bad[0].hint) if bad[0].check == "parameters" else Place()
    if all(figure.check == "state" for figure in ran):
        worst = max(ran, key=lambda figure: figure.measured)
        return Place(worst.tensor, "tensor", "its value after the run")
    from parity.judge.trace import trace

    found = trace(setup, ran[0].mode or modes[0], dtypes[0])
    if found.kind:
        return found
    if found.what:
        setup.notes.append(found.what)
    if any(figure.check == "outputs" for figure in ran):
        return Place(next(f.tensor for f in ran if f.check == "outputs"), "output")
    worst = max(ran, key=lambda figure: figure.measured)
    return Place(worst.tensor, "tensor", "its gradient")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("jax", "flax", "equinox", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
