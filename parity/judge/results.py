"""Outputs of two sides that belong together."""

import numpy as np

Outputs = list[tuple[str, np.ndarray]]


def named(outputs: Outputs) -> Outputs:
    return [(path or "output", x) for path, x in outputs]


def paired(a: Outputs, b: Outputs) -> list[tuple[str, np.ndarray, np.ndarray]] | None:
    """Outputs that belong together: by path if the paths are the same, else in order; None if that is not possible."""
    mine, theirs = dict(named(a)), dict(named(b))
    if mine.keys() == theirs.keys():
        return [(path, x, theirs[path]) for path, x in mine.items()]
    if len(a) != len(b):
        return None
    return [(path, x, y) for (path, x), (_, y) in zip(named(a), b, strict=True)]
