"""What may differ: a multiple of what rounding does to the reference, and never more than a cap of the dtype.

The candidate has no part in it. Rounding is measured in two ways, of which the larger counts: one ulp in every weight
and input of the reference, in a few draws; and in a narrower dtype its own distance from float64.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from parity.judge.maps import Arrays

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # spacing of numbers at 1
# Rounding inside of an operation, as in sums over some thousand terms in another order, which no ulp outside shows.
FLOOR_ULPS = 64.0
NOISE_FACTOR = 16.0  # measured over pairs of correct programs: at most 3 times what one ulp does
TRUTH_FACTOR = 8.0  # two programs that round in other places err by like amounts
# Where rounding alone takes more than this, a comparison cannot tell a bug from it, and is not made: 9 of float64's 16
# digits, 3 of float32's 7, one of the two that bfloat16 has.
CAP = {"float64": 2.0**-30, "float32": 2.0**-10, "bfloat16": 2.0**-3, "float16": 2.0**-4}
# A tensor as small as this beside all of its kind is measured against them: a gradient that is zero by mathematics
# comes out as rounding noise.
FLOOR = 1e-3
LARGE = 1e4  # times the median of a tensor's numbers


@dataclasses.dataclass(frozen=True)
class Allowance:
    """The bound of each tensor; NaN where rounding takes more than the cap."""

    allowed: dict[str, float]
    noise: dict[str, float]


def allowance(
    dtype: str, nudged: Iterable[Mapping[str, float]], truth: Mapping[str, float], names: Iterable[str]
) -> Allowance:
    """The bounds of tensors by name. nudged: the errors of the reference with one ulp moved, of each draw. truth: its
    errors by its float64 run.
    """
    noise, allowed = {}, {}
    draws = list(nudged)
    per_name = {name: max((x.get(name, 0.0) for x in draws), default=0.0) for name in names}
    finite = [x for x in per_name.values() if math.isfinite(x)]
    common = math.sqrt(sum(x * x for x in finite) / len(finite)) / 4 if finite else 0.0
    for name, x in per_name.items():
        noise[name] = max(x, common)
        bound = max(FLOOR_ULPS * EPS[dtype], NOISE_FACTOR * noise[name], TRUTH_FACTOR * truth.get(name, 0.0))
        allowed[name] = bound if bound <= max(CAP[dtype], FLOOR_ULPS * EPS[dtype]) else math.nan
    return Allowance(allowed, noise)


def errors(a: Arrays, b: Arrays, kinds: bool = False) -> dict[str, float]:
    """The error of every tensor of a by b: the norm of the difference over that of b, and at least FLOOR of the norm
    of all of b if kinds; infinite where shapes differ or one is not finite where the other is.
    """
    largest = 1e150  # its square is a float64
    total = math.sqrt(
        sum(float(np.sum(np.minimum(np.abs(x[np.isfinite(x)]), largest) ** 2)) for x in b.values() if x.size)
    )
    return {name: error(a.get(name), x, FLOOR * total if kinds else 0.0) for name, x in b.items()}


def error(a: np.ndarray | None, b: np.ndarray, floor: float = 0.0) -> float:
    if a is None or a.shape != b.shape:
        return math.inf
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    bad_a, bad_b = ~np.isfinite(a), ~np.isfinite(b)
    if not np.array_equal(a[bad_a | bad_b], b[bad_a | bad_b], equal_nan=True):
        return math.inf
    good = ~bad_b
    # numbers as large as a mask's would hide all others: they are measured by themselves, each
    sizes = np.abs(b[good & (b != 0)])
    large = good & (np.abs(b) > LARGE * (np.median(sizes) if sizes.size else 1.0))
    if large.any() and not large[good].all():
        apart = float(np.max(np.abs(a[large] - b[large]) / np.abs(b[large])))
        rest = error(np.where(large, 0.0, a), np.where(large, 0.0, b), floor)
        return max(apart, rest) if math.isfinite(apart) else math.inf
    size = max(float(np.linalg.norm(b[good])), floor, 1e-300)
    found = float(np.linalg.norm(a[good] - b[good])) / size
    return found if math.isfinite(found) else math.inf


def moved(x: np.ndarray, dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Every number times one and a spacing, up or down by chance."""
    return x * (1 + EPS[dtype] * rng.choice([-1.0, 1.0], x.shape))
