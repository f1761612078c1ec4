"""Errors, verdicts and the rows of the table.

The error of a tensor a against b is ||a - b|| / max(||b||, FLOOR x global norm): relative, and not fooled by a tensor
that is zero up to rounding. Every check has three witnesses, so a verdict names the side.
"""

import dataclasses
import enum
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from llm_common.errors import UserError, first_line
from llm_common.tensors import Tensors

# A gradient that is exactly zero, as that of q behind a softmax over one key, comes out as rounding noise: in float64
# up to 6e-17 of the global norm (measured over random configs), which must stay below 1e-12 after the division. A bug
# that changes a tensor as small as 1e-5 of the global norm by one part in a million still shows as 1e-8.
FLOOR = 1e-3
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "tf32": 2.0**-10}  # spacing of numbers at 1


CANONICAL = re.compile(r"(model|lm_head)\.")  # how the names of tensors begin


class Side(enum.StrEnum):
    """Who is to blame; its value is how it is said."""

    NOBODY = ""
    JAX = "JAX"
    TORCH = "torch"
    BOTH = "JAX and torch, differently"
    SHARED = "both alike: shared code or the specification"
    CHECK = "the check itself"
    UNKNOWN = "JAX or torch: a third witness would tell"


JAX, TORCH, BOTH, SHARED = Side.JAX, Side.TORCH, Side.BOTH, Side.SHARED


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, what is allowed, and if it does not hold, on which side."""

    check: str
    item: str
    dtype: str
    measured: float
    allowed: float
    ok: bool
    side: Side | str = Side.NOBODY  # nobody if ok; one of Side's values becomes that Side
    note: str = ""
    place: str = ""  # the tensor, module or function where it is worst
    noise: float | None = None  # what the frameworks' own choices (jit, batch size, kernels) do to this figure

    def __post_init__(self) -> None:
        object.__setattr__(self, "side", Side(self.side))
        if self.ok and not (math.isfinite(self.measured) and math.isfinite(self.allowed)):
            object.__setattr__(self, "ok", False)  # nothing was measured, or anything would have been let through
            object.__setattr__(self, "side", Side.CHECK)
            object.__setattr__(self, "note", f"no finite figure or bound; {self.note}")


def global_norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in tensors.values()))


def tensor_errors(a: Tensors, b: Tensors) -> dict[str, float]:
    """The error of every tensor of a against b; infinite where a is missing, has another shape or is not finite."""
    return {name: tensor_error(a.get(name), b[name], size) for name, size in tensor_sizes(b).items()}


def tensor_sizes(b: Tensors) -> dict[str, float]:
    """What the error of every tensor is measured against: its norm, and at least FLOOR of the global one."""
    floor = max(FLOOR * global_norm(b), 1e-300)
    return {name: max(float(np.linalg.norm(x)), floor) for name, x in b.items()}


def tensor_error(a: np.ndarray | None, b: np.ndarray, size: float) -> float:
    """||a - b|| / size; infinite if a is missing, of another shape or not finite."""
    if a is None or a.shape != b.shape:
        return math.inf
    if np.array_equal(a, b):
        return 0.0
    error = float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))) / size
    return error if math.isfinite(error) else math.inf


def worst(errors: dict[str, float]) -> tuple[str, float]:
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


def verdict(jax_bad: bool, torch_bad: bool, alike: bool) -> Side:
    """The side to blame, from which sides disagree with the specification and whether the two agree with each other."""
    if jax_bad and torch_bad:
        return SHARED if alike else BOTH
    return JAX if jax_bad else TORCH if torch_bad else Side.NOBODY


def three_way(check: str, item: str, dtype: str, results: Sequence[Tensors], allowed: float, note: str = "") -> Row:
    """A row for results of JAX, torch and the specification that must all be the same: the worst tensor decides."""
    jax, torch, spec = results
    jax_name, jax_error = worst(tensor_errors(jax, spec))
    torch_name, torch_error = worst(tensor_errors(torch, spec))
    pair_name, pair_error = worst(tensor_errors(jax, torch))
    measured, name = max((jax_error, jax_name), (torch_error, torch_name), (pair_error / 2, pair_name))
    alike = pair_error <= 2 * allowed or jax_error == torch_error == math.inf  # not finite on either side: alike
    side = verdict(jax_error > allowed, torch_error > allowed, alike)
    where = name if len(spec) > 1 else ""
    return Row(check, item, dtype, measured, allowed, not side, side, ", ".join(x for x in (where, note) if x), where)


def worse_side(check: str, item: str, dtype: str, errors: Sequence[Mapping[str, float]], allowed: float) -> Row:
    """A row for errors of JAX and of torch by name, each judged for itself: the worst decides, and is the place if it
    is too large.
    """
    (jax_name, jax_error), (torch_name, torch_error) = (worst(dict(found)) for found in errors)
    side = verdict(not jax_error <= allowed, not torch_error <= allowed, True)
    name = jax_name if jax_error >= torch_error else torch_name
    return Row(check, item, dtype, max(jax_error, torch_error), allowed, not side, side, name, name if side else "")


def each_number(
    check: str,
    item: str,
    results: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Any],
    allowed: float | Mapping[str, float],
) -> Row:
    """A row for single float64 numbers of JAX, torch and the specification, whose name is the note: the first that
    differs, or the worst. Each is compared by itself: among others it would be measured against their norm. One that is
    missing is no number. allowed: of all, or by name.
    """
    rows = []
    bounds = allowed if isinstance(allowed, Mapping) else dict.fromkeys(expected, allowed)
    for key, x in expected.items():
        values = [{key: np.array(float(found.get(key, math.nan)))} for found in (*results, {key: x})]
        rows.append(three_way(check, item, "float64", values, bounds[key], key))
    return next((row for row in rows if not row.ok), max(rows, key=lambda row: row.measured))


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to a dtype's numbers, to nearest and ties to even, and returned as float64."""
    if dtype == "float64":
        return np.asarray(x, np.float64)
    x = np.asarray(x, np.float32)
    if dtype == "float16":
        x = x.astype(np.float16)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        x = bits.astype(np.uint32).view(np.float32)
    return x.astype(np.float64)


def spacing(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between neighbouring numbers of a dtype at x (one ulp), float64."""
    x = np.abs(np.asarray(x, np.float64))
    exponent = np.floor(np.log2(np.maximum(x, 2.0**-126)))
    return EPS[dtype] * 2.0**exponent


def one_ulp_noise(seed: int, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function that moves every number of an array by one ulp, up or down by chance."""
    rng = np.random.default_rng((seed, 4))
    return lambda x: x + spacing(x, dtype) * rng.choice([-1.0, 1.0], x.shape)


def shared(check: str, item: str, wrong: float, allowed: float = 0.0, place: str = "", dtype: str = "") -> Row:
    """A row for what neither framework owns: what is wrong there is wrong on both sides alike."""
    ok = wrong <= allowed
    return Row(check, item, dtype, wrong, allowed, ok, "" if ok else SHARED, place=place)


PACKAGES = {"jax_llm": JAX, "torch_llm": TORCH, "llm_common": SHARED}


def raised_in(error: BaseException) -> tuple[Side | str, str]:
    """The side and the function of ours in which an exception was raised, or in which what raised it was called; with
    it what had called that function, and what the check had called: the mistake is often in what was handed over.
    """
    side, path = "", []
    for package, frame in _frames(error):
        if package in PACKAGES:
            side, code = PACKAGES[package], frame.f_code
            function = re.sub(r"<locals>\.|(\.?<\w+>)+$", "", code.co_qualname) or "the module"
            path.append(f"{function} in {Path(code.co_filename).name}")
    inner_first = list(dict.fromkeys(reversed(path)))
    place = ", called by ".join(inner_first[:2])
    place += f", in a call of {inner_first[-1]}" if len(inner_first) > 2 else ""
    missing = error.args[0] if isinstance(error, KeyError) and error.args else ""
    if isinstance(missing, str) and CANONICAL.match(missing):  # a tensor that a model has and its weights lack
        place = f"{missing}: {place}"
    return side, place


def called_by(error: BaseException) -> Side | None:
    """The side that called the shared code in which an exception was raised, if one did."""
    sides = [PACKAGES[package] for package, _ in _frames(error) if package in ("jax_llm", "torch_llm")]
    return sides[-1] if sides else None


def _frames(error: BaseException) -> Iterator[tuple[str, FrameType]]:
    """The frames that an exception came through, outermost first, with the package that each is of."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame.f_globals.get("__name__", "").split(".")[0], frame


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def crash(check: str, error: Exception) -> Row:
    """A row for an exception; the side is the one whose package the traceback ends in."""
    if isinstance(error, Raised):
        return Row(check, "raised an error", "", math.nan, 0, False, error.side, f"raised {error.note}", error.place)
    side, place = raised_in(error)
    side = side or looked_at(error) or Side.CHECK
    return Row(check, "raised an error", "", math.nan, 0, False, side, said(error), place)


def looked_at(error: BaseException) -> str:
    """The side whose results a check was looking at when it raised: something that it expects is not among them."""
    names = [getattr(frame.f_locals.get("side"), "name", "") for _, frame in _frames(error)]
    found = next(filter(None, reversed(names)), "")
    return found if found in (JAX, TORCH) else ""


def refuses(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a call raises UserError."""
    try:
        function(*arguments)
    except UserError:
        return True
    return False


class Raised(Exception):
    """One side raised, or both did."""

    def __init__(self, side: str, note: str, place: str = "") -> None:
        super().__init__(note)
        self.side, self.note, self.place = side, note, place


def on_both(sides: Any, call: Callable[[Any], Any]) -> list[Any]:
    """What both sides give. Raises Raised, with the side that raised something, and the function."""
    results: list[Any] = []
    raised: list[Exception | None] = []
    for side in sides:
        try:
            results.append(call(side))
            raised.append(None)
        except Exception as error:  # whatever a broken side raises is a finding
            raised.append(error)
    errors = [error for error in raised if error is not None]
    if errors:
        alike = len(errors) == 2 and type(errors[0]) is type(errors[1])
        side = verdict(raised[0] is not None, raised[1] is not None, alike)
        raise Raised(side, said(errors[0]), raised_in(errors[0])[1]) from errors[0]
    return results
