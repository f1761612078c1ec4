"""Cases nobody chose: a space of settings, cases drawn from it or covering every pair of its values, and the smallest
that fails.

A space gives each feature its values, the simplest first. A case has one value of each; it is JSON, so that a line
repeats it. Why not Hypothesis: a case takes seconds, and its shrinker runs hundreds; here each feature is tried with
its simpler values, once.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Case = dict[str, Any]
Space = dict[str, tuple[Any, ...]]
Fix = Callable[[Case], Case]  # changes what cannot be together


def draw(space: Space, rng: np.random.Generator, fix: Fix) -> Case:
    """A case with every value equally likely."""
    return fix({name: values[rng.integers(len(values))] for name, values in space.items()})


def covering(space: Space, fix: Fix, seed: int = 0, tries: int = 40) -> list[Case]:
    """Cases in which every pair of values of two features meets, where the two can be together; few, found greedily."""
    rng, cases = np.random.default_rng(seed), []
    missing = set(reachable_pairs(space, fix))
    while missing:
        (a, i), (b, j) = min(missing)  # sorted, so that the same seed gives the same cases
        candidates = []
        for _ in range(tries):
            case = {name: values[rng.integers(len(values))] for name, values in space.items()}
            candidates.append(fix({**case, a: space[a][i], b: space[b][j]}))
        best = max(candidates, key=lambda case: len(missing & pairs_of(space, case)))
        if not missing & pairs_of(space, best):
            missing.discard(((a, i), (b, j)))  # the two meet only where a third value allows it, which was not drawn
            continue
        missing -= pairs_of(space, best)
        cases.append(best)
    return cases


def pairs_of(space: Space, case: Case) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """The pairs of values that meet in a case, each value by its feature and number."""
    numbered = sorted((name, space[name].index(case[name])) for name in space)
    return set(itertools.combinations(numbered, 2))


def reachable_pairs(space: Space, fix: Fix) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """The pairs that a case can have."""
    simplest = {name: values[0] for name, values in space.items()}
    for a, b in itertools.combinations(sorted(space), 2):
        for i, j in itertools.product(range(len(space[a])), range(len(space[b]))):
            case = fix({**simplest, a: space[a][i], b: space[b][j]})
            if (case[a], case[b]) == (space[a][i], space[b][j]):
                yield (a, i), (b, j)


def shrink(case: Case, space: Space, fix: Fix, fails: Callable[[Case], bool]) -> Case:
    """The smallest case that still fails: each feature in turn with its simpler values, until nothing changes."""
    while True:
        before = case
        for name, values in space.items():
            for value in values[: values.index(case[name])]:
                simpler = fix({**case, name: value})
                if simpler != case and fails(simpler):
                    case = simpler
                    break
        if case == before:
            return case


def needed(case: Case, space: Space) -> list[str]:
    """The features of a shrunk case that are not at their simplest value: without any of them it holds."""
    return [name for name, values in space.items() if case[name] != values[0]]


def to_line(case: Case) -> str:
    return json.dumps(case, separators=(",", ":"))


def from_line(text: str, space: Space, fix: Fix) -> Case:
    """A case from JSON; features that are not given have their simplest value. Raises ValueError, naming what
    is wrong.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError("not an object")
    case = {name: values[0] for name, values in space.items()}
    for name, value in given.items():
        if name not in space:
            raise ValueError(f"unknown feature {name!r}; known: {', '.join(space)}")
        value = tuple(value) if isinstance(value, list) else value
        if value not in space[name]:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(repr, space[name]))}")
        case[name] = space[name][space[name].index(value)]  # 1 for true, true for 1
    return fix(case)
