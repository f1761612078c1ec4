"""Nests of arrays without a framework: dicts, lists, dataclasses and None, with a path for each leaf."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """(path, leaf) of everything in a nest; None holds nothing."""
    parts = _parts(tree)
    if parts is None:
        return [] if tree is None else [(".".join(path), tree)]
    return [found for key, value in parts for found in leaves(value, (*path, str(key)))]


def mapped(f: Callable[[Any], Any], tree: Any) -> Any:
    """The nest with f of each leaf; a mapping of another kind becomes a dict."""
    if tree is None or _parts(tree) is None:
        return None if tree is None else f(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(f, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        made = [mapped(f, value) for value in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    fields = {x.name: mapped(f, getattr(tree, x.name)) for x in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **fields)


def _parts(tree: Any) -> list[tuple[Any, Any]] | None:
    """(key, value) of what a nest holds, or None of a leaf."""
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, (list, tuple)):
        return list(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not hasattr(tree, "dtype"):
        return [(x.name, getattr(tree, x.name)) for x in dataclasses.fields(tree)]
    return None


def is_float(x: Any) -> bool:
    """Whether an array holds real numbers, those of ml_dtypes among them."""
    name = np.dtype(x.dtype).name
    return np.issubdtype(x.dtype, np.floating) or "float" in name


def is_complex(x: Any) -> bool:
    return np.issubdtype(x.dtype, np.complexfloating)


def exact(x: Any) -> np.ndarray:
    """A NumPy array of the same values: float64 of real numbers, complex128 of complex ones, integers as they are."""
    x = np.asarray(x)
    return x.astype(np.float64) if is_float(x) else x.astype(np.complex128) if is_complex(x) else np.array(x)


def is_array(x: Any) -> bool:
    """Whether a leaf is compared: an array or a number, not text, a function or a flag."""
    return isinstance(x, (np.ndarray, np.generic, int, float, complex)) and not isinstance(x, (bool, str))
