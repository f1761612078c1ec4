"""Which tensor of a torch module is which leaf of a JAX pytree, and how the one becomes the other.

Found by value where both already hold the same weights, else by shape and name. A leaf may be transposed (Flax's
kernels are (in, out)), have its heads in an axis of their own, or be one layer of a stack. What is not found, or could
be two things, is said by name instead of guessed.
"""

import difflib
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llm_common.errors import UserError
from parity.judge.jax_side import path_name

Arrays = dict[str, np.ndarray]
SYNONYMS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "w": "weight", "b": "bias", "gamma": "weight"}
SYNONYMS |= {
    "beta": "bias",
    "norm": "layernorm",
    "ln": "layernorm",
    "linear": "",
    "dense": "",
    "params": "",
    "value": "",
}
SURE = 0.05  # by how much a name must be more alike than the second best


@dataclass(frozen=True)
class Source:
    """How a torch tensor is made from leaves: one leaf, perhaps an index of a stack, perhaps with its axes
    rearranged.
    """

    leaf: str
    index: int | None = None
    axes: tuple[int, ...] | None = None  # a permutation, before the reshape
    shape: tuple[int, ...] = ()  # of the torch tensor

    def __call__(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        x = leaves[self.leaf] if self.index is None else leaves[self.leaf][self.index]
        return (x if self.axes is None else np.transpose(x, self.axes)).reshape(self.shape)

    def put(self, leaves: Arrays, tensor: np.ndarray) -> None:
        """The inverse: write a torch tensor into its leaf."""
        leaf = leaves[self.leaf]
        target = leaf if self.index is None else leaf[self.index]
        if self.axes is None:
            value = tensor.reshape(target.shape)
        else:
            moved = tuple(target.shape[a] for a in self.axes)
            value = np.transpose(tensor.reshape(moved), np.argsort(self.axes))
        target[...] = value

    def describe(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        how = "" if self.axes is None else ", transposed" if self.axes == (1, 0) else f", axes {self.axes}"
        return f"{self.leaf}{index}{how}"


@dataclass
class Matching:
    """torch name -> how it is made. `how` says by what it was found; the rest is what has no partner."""

    sources: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # torch name -> why
    unused: list[str] = field(default_factory=list)  # leaves that no tensor uses

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unused


def leaves_of(params: Any) -> Arrays:
    """Path -> array of every floating-point leaf of a pytree; path parts are joined by dots."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            found[path_name(path)] = np.array(leaf, np.float64)
    return found


def with_leaves(params: Any, leaves: Mapping[str, np.ndarray], dtype: Any) -> Any:
    """The pytree with its floating-point leaves replaced, in a dtype."""

    def replace(path, leaf):
        name = path_name(path)
        return jax.numpy.array(leaves[name], dtype) if name in leaves else leaf

    return jax.tree_util.tree_map_with_path(replace, params)


def match(tensors: Arrays, leaves: Arrays, names: Mapping[str, Any] | None = None) -> Matching:
    """Find the leaf of every torch tensor. names: those already known, torch name -> path, `Source` or function of the
    leaves.
    """
    result = Matching()
    used: set[tuple[str, int | None]] = set()
    for name, given in (names or {}).items():
        if name not in tensors:
            raise UserError(f"names: torch has no parameter {name!r}; it has {', '.join(tensors)}")
        _take_given(result, used, name, given, tensors[name], leaves)
    candidates = {name: _candidates(x, leaves) for name, x in tensors.items() if name not in result.sources}
    by_value = {name: [c for c in found if _same(c(leaves), tensors[name])] for name, found in candidates.items()}
    shared = bool(candidates) and sum(map(bool, by_value.values())) > len(candidates) / 2
    pool = by_value if shared else candidates
    how = "value" if shared else "shape and name"
    # the surest first: a name that is far more alike than any other
    waiting = dict(pool)
    while waiting:
        choice = max(
            (
                (name, *_best(name, [c for c in found if (c.leaf, c.index) not in used]))
                for name, found in waiting.items()
            ),
            key=lambda x: (x[1] is not None and x[3], x[2]),
        )
        name, source, _, sure = choice
        del waiting[name]
        if source is None:
            shapes = sorted({str(x.shape) for x in leaves.values()})
            why = (
                f"no leaf holds its values {tensors[name].shape}"
                if shared
                else f"no leaf left of shape {tensors[name].shape}"
            )
            result.missing[name] = why if shared else f"{why}; there are {', '.join(shapes)}"
            continue
        if not sure and not _same_place(name, source.leaf):
            alike = [c.leaf for c in pool[name] if (c.leaf, c.index) not in used]
            result.missing[name] = f"could be {' or '.join(dict.fromkeys(alike))}; say which in names="
            continue
        used.add((source.leaf, source.index))
        result.sources[name], result.how[name] = source, f"{source.describe()} (by {how})"
    used_leaves = {leaf for leaf, _ in used}
    known = result.sources.values()
    functions = any(not isinstance(source, Source) for source in known)
    result.unused = [] if functions else [leaf for leaf in leaves if leaf not in used_leaves]
    return result


def _take_given(result: Matching, used: set, name: str, given: Any, tensor: np.ndarray, leaves: Arrays) -> None:
    if isinstance(given, str):
        path = given.replace("/", ".")
        options = [
            c for c in _candidates(tensor, leaves) if path in (c.leaf, f"{c.leaf}[{c.index}]", f"params.{c.leaf}")
        ]
        if not options:
            shape = leaves[path].shape if path in leaves else f"no such leaf; there are {', '.join(leaves)}"
            raise UserError(f"names: {name!r} {tensor.shape} cannot be made of {given!r} ({shape})")
        options.sort(key=lambda c: not _same(c(leaves), tensor))
        given = options[0]
    if isinstance(given, Source):
        used.add((given.leaf, given.index))
        result.how[name] = f"{given.describe()} (given)"
    else:
        try:
            made = np.asarray(given(leaves))
        except KeyError as error:
            raise UserError(f"names: {name!r} asks for the leaf {error}; there are {', '.join(leaves)}") from None
        if made.shape != tensor.shape:
            raise UserError(f"names: {name!r} has shape {tensor.shape}, the function given for it makes {made.shape}")
        result.how[name] = "a function (given)"
    result.sources[name] = given


def _candidates(tensor: np.ndarray, leaves: Arrays) -> list[Source]:
    """Every way in which a leaf, or a layer of one, has the shape of a tensor after moving axes and joining heads."""
    found: list[Source] = []
    for leaf, x in leaves.items():
        found += _ways(leaf, None, x, tensor.shape)
        if x.ndim > tensor.ndim and x.ndim >= 2:
            for i in range(x.shape[0]):
                found += _ways(leaf, i, x[i], tensor.shape)
    return found


def _ways(leaf: str, index: int | None, x: np.ndarray, shape: tuple[int, ...]) -> list[Source]:
    if x.size != int(np.prod(shape)):
        return []
    kernel = leaf.rsplit(".", 1)[-1] == "kernel"
    ways = []
    if x.shape == shape:
        ways.append(Source(leaf, index, None, shape))
    if x.ndim == len(shape) and x.ndim >= 2:
        for axes in itertools.permutations(range(x.ndim)):
            if axes != tuple(range(x.ndim)) and tuple(x.shape[a] for a in axes) == shape:
                ways.append(Source(leaf, index, axes, shape))
    elif x.ndim == len(shape) + 1:  # heads in an axis of their own
        if len(shape) == 1:
            ways.append(Source(leaf, index, None, shape))
        elif x.ndim == 3 and (x.shape[1] * x.shape[2], x.shape[0]) == shape:
            ways.append(Source(leaf, index, (1, 2, 0), shape))
        elif x.ndim == 3 and (x.shape[2], x.shape[0] * x.shape[1]) == shape:
            ways.append(Source(leaf, index, (2, 0, 1), shape))
    # a kernel is (in, out), or for a convolution (height, width, in, out): torch has (out, in, height, width)
    usual = (1, 0) if x.ndim == 2 else (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)) if x.ndim > 3 else None
    return sorted(ways, key=lambda w: (w.axes != usual) if kernel and x.ndim == len(shape) else w.axes is not None)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-7 * max(1.0, float(np.abs(b).max(initial=0))))


def words(name: str) -> list[str]:
    """The parts of a name, in words that both frameworks share, with numbers apart."""
    parts = re.findall(r"[a-zA-Z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    return [w for part in parts if (w := SYNONYMS.get(part.lower(), part.lower()))]


def likeness(torch_name: str, leaf: str, index: int | None = None) -> float:
    """How alike two names are, 0 to 1. The index of a stack stands where the torch name has its number."""
    a, b = words(torch_name), words(leaf)
    if index is not None:
        numbers = [w for w in a if w.isdigit()]
        if str(index) not in numbers:
            return 0.0
        a = [w for w in a if not w.isdigit()]
        b = [w for w in b if not w.isdigit()]
    else:
        last = lambda words: [w for w in words if w.isdigit()]
        if last(a) and last(b) and last(a) != last(b) and len(last(a)) == len(last(b)):
            return 0.4 * difflib.SequenceMatcher(None, a, b).ratio()
    return difflib.SequenceMatcher(None, a, b).ratio() + 0.2 * (a[-1:] == b[-1:])


def _best(name: str, found: list[Source]) -> tuple[Source | None, float, bool]:
    """The candidate with the likest name, how alike it is, and whether it is clearly the best."""
    scored: dict[tuple[str, int | None], tuple[float, Source]] = {}
    for c in found:
        scored.setdefault((c.leaf, c.index), (likeness(name, c.leaf, c.index), c))
    ranked = sorted(scored.values(), key=lambda x: -x[0])
    if not ranked:
        return None, 0.0, False
    margin = ranked[0][0] - ranked[1][0] if len(ranked) > 1 else 1.0
    return ranked[0][1], ranked[0][0], margin > SURE


def _same_place(torch_name: str, leaf: str) -> bool:
    """Whether two names agree in their last word and in all numbers, as far as both have any."""
    a, b = words(torch_name), words(leaf)
    numbers = [[w for w in x if w.isdigit()] for x in (a, b)]
    return a[-1:] == b[-1:] and bool(numbers[0]) and numbers[0] == numbers[1]
