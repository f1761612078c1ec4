"""Other ways to read a pair whose names do not say enough: values decide.

Where the outputs differ, square matrices of a kind are turned, kernels of transposed convolutions are flipped, the rows
of a matrix behind a flattened picture are reordered, and tensors that were guessed change places. A way by which the
outputs agree is the right one, for a wrong one does not make two programs agree.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from parity.judge.allowance import error
from parity.judge.maps import Map, Part
from parity.judge.results import paired

Change = dict[str, Map]
MOST = 64  # ways that are tried
AGREE = {"float64": 1e-6, "float32": 1e-4}  # far above rounding, far below what a wrong way gives


def settle(setup: Any, mode: str, dtype: str) -> None:
    """Take the first way by which the outputs agree, if they do not as the names were read."""
    if setup.matching.missing or setup.matching.unused or setup.given_weights:
        return
    agree = AGREE.get(dtype, 0.05)
    try:
        ours = setup.run("reference", setup.parameters, setup.state, dtype, mode, gradients=False)
    except Exception:  # told of where it is judged
        return
    known = setup.matching.maps
    if _distance(setup, ours, dtype, mode) <= agree:
        return
    changes = list(_changes(setup))
    for n in (1, 2, 3):
        for chosen in itertools.islice(itertools.combinations(changes, n), MOST):
            names = [name for _, change in chosen for name in change]
            if len(set(names)) < len(names):
                continue
            setup.matching.maps = {**known, **{name: made for _, change in chosen for name, made in change.items()}}
            if _distance(setup, ours, dtype, mode) <= agree:
                for what, change in chosen:
                    setup.notes.append(f"found by the values: {what}")
                    for name, made in change.items():
                        setup.matching.how[name] = f"{made} (by the values)"
                setup.matching.guesses = []
                return
    setup.matching.maps = known


def _distance(setup: Any, ours: Any, dtype: str, mode: str) -> float:
    try:
        theirs = setup.run("candidate", setup.parameters, setup.state, dtype, mode, gradients=False)
    except Exception:
        return math.inf
    found = [
        error(np.asarray(setup.layout.output(b, a.shape, back=True), a.dtype), a)
        for _, a, b in paired(ours.outputs, theirs.outputs) or ()
        if np.issubdtype(a.dtype, np.inexact)
    ]
    return max(found, default=math.inf)


def _changes(setup: Any) -> Iterator[tuple[str, Change]]:
    """(what is done, the maps that it changes)."""
    how = setup.matching.how
    fixed = lambda name: any(words in how[name] for words in ("(given)", "(by value)", "(the same name)"))
    maps = {name: made for name, made in setup.matching.maps.items() if isinstance(made, Map) and not fixed(name)}
    shapes = {name: made(setup.parameters).shape for name, made in maps.items()}
    yield from _turned({name: maps[name] for name in setup.matching.unoriented if name in maps}, shapes)
    if setup.reference.framework != setup.candidate.framework:
        transposed = {name: made for name, made in maps.items() if _is_transposed(setup, name, made)}
        yield from _flipped(transposed, {name: shapes[name] for name in transposed})
        if setup.layout.text:
            yield from _flattened(maps, shapes)
    yield from _swapped(setup, maps, shapes)


def _is_transposed(setup: Any, name: str, made: Map) -> bool:
    """Whether a kernel is that of a transposed convolution, by the module or the name."""
    module: Any = getattr(setup.candidate, "module", None)
    words = f"{name} {made}".lower()
    if hasattr(module, "get_submodule"):
        with contextlib.suppress(AttributeError):
            words += type(module.get_submodule(name.rpartition(".")[0])).__name__.lower()
    return "transpose" in words.replace("transposed", "") or "deconv" in words


def _each(made: Map, change: Callable[[Part], Part]) -> Map:
    return replace(made, parts=tuple(change(part) for part in made.parts))


def _turned(maps: dict[str, Map], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Change]]:
    """Square matrices, of each kind of leaf together, then each alone."""
    square = [name for name in maps if len(shapes[name]) == 2 and shapes[name][0] == shapes[name][1] > 1]
    kinds: dict[str, list[str]] = {}
    for name in square:
        if len(maps[name].parts) == 1:
            kinds.setdefault(maps[name].parts[0].leaf.rsplit(".", 1)[-1], []).append(name)
    turn = lambda name: _each(maps[name], lambda part: part.then(("transpose", (1, 0))))
    for kind, names in kinds.items():
        yield f"the square matrices {kind} are turned", {name: turn(name) for name in names}
    for kind, names in kinds.items():
        if len(names) > 1:
            for name in names:
                yield f"{name} of {kind} is turned", {name: turn(name)}


def _flipped(maps: dict[str, Map], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Change]]:
    """Kernels of transposed convolutions, which one framework correlates with and the other convolves."""
    found = {}
    for name, shape in shapes.items():
        steps = [how for part in maps[name].parts for kind, how in part.steps if kind == "transpose"]
        spatial = tuple(range(2, len(shape)))
        if len(shape) > 2 and math.prod(shape[2:]) > 1:
            flip = lambda part, spatial=spatial: part.then(("flip", spatial))
            found[name] = _each(maps[name], flip), bool(steps) and steps[0][:2] != (len(shape) - 1, len(shape) - 2)
    likely = {name: made for name, (made, is_likely) in found.items() if is_likely}
    if likely:
        yield "the kernels of transposed convolutions are flipped", likely
    for name, (made, _) in found.items():
        if {name} != set(likely):
            yield f"the kernel {name} is flipped", {name: made}
    for name, shape in shapes.items():
        if len(shape) > 2 and shape[0] == shape[1]:
            axes = (1, 0, *range(2, len(shape)))
            both = _each(maps[name], lambda part, axes=axes: part.then(("transpose", axes)))
            yield f"the channels of {name} change places", {name: both}
            flipped = _each(both, lambda part, spatial=axes[2:]: part.then(("flip", spatial)))
            yield f"the channels of {name} change places, and it is flipped", {name: flipped}


def _flattened(maps: dict[str, Map], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Change]]:
    """A matrix behind a flattened picture: its inputs are in the order (place, channel) or (channel, place)."""
    channels = {n for shape in shapes.values() if len(shape) > 2 for n in shape[:2]}
    for name, shape in shapes.items():
        if len(shape) != 2 or len(maps[name].parts) != 1:
            continue
        for c in sorted(channels):
            if 1 < c < shape[1] and shape[1] % c == 0:
                places = shape[1] // c
                for split, what in (((places, c), "places first"), ((c, places), "channels first")):
                    steps = (("reshape", (shape[0], *split)), ("transpose", (0, 2, 1)), ("reshape", shape))
                    made = _each(maps[name], lambda part, steps=steps: part.then(*steps))
                    yield f"the inputs of {name} are a flattened picture of {c} channels, {what}", {name: made}


def _swapped(setup: Any, maps: dict[str, Map], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Change]]:
    """Guesses of one shape change places, and modules of one kind with all their tensors."""
    guesses = [name for name in setup.matching.guesses if name in maps]
    modules: dict[str, list[str]] = {}
    for name in maps:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    kinds = {
        module: sorted((name.rpartition(".")[2], shapes[name]) for name in names) for module, names in modules.items()
    }
    unsure = [module for module, names in modules.items() if any(name in guesses for name in names)]
    for a, b in itertools.combinations(unsure, 2):
        if kinds[a] == kinds[b]:
            change = {}
            for name in modules[a]:
                other = f"{b}.{name.rpartition('.')[2]}".lstrip(".")
                change |= {name: maps[other], other: maps[name]}
            yield f"{a} and {b} change places", change
    for a, b in itertools.combinations(guesses, 2):
        if shapes[a] == shapes[b] and a.rpartition(".")[0] == b.rpartition(".")[0]:
            yield f"{a} and {b} change places", {a: maps[b], b: maps[a]}
