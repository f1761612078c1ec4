"""The dtypes of tensors in a model that generates, seen at the kernels it is given; imports neither framework."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

# Kernels of the model, and how many of their first arguments are activations, the cache's keys and values among them.
GENERATED = {"attention": 3, "norm": 2, "activation": 2}


@contextlib.contextmanager
def noted_dtypes(package: str, dtype: str) -> Iterator[list[str]]:
    """A list to which, while this is open, what has another dtype is added: kernel, which tensor, its dtype.

    A generator must be made within this.
    """
    wrong: list[str] = []
    make = importlib.import_module(f"{package}.fast.kernels").make_kernels

    def make_noting(*args: Any, **kwargs: Any) -> Any:
        kernels = make(*args, **kwargs)
        noting = {name: _noting(getattr(kernels, name), name, n, dtype, wrong) for name, n in GENERATED.items()}
        return dataclasses.replace(kernels, **noting)

    with mock.patch(f"{package}.engine.plan.make_kernels", make_noting):
        yield wrong


def _noting(kernel: Callable[..., Any], name: str, n: int, dtype: str, wrong: list[str]) -> Callable[..., Any]:
    """The kernel, which notes those of its first n arguments and its result that have another dtype."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = kernel(*args, **kwargs)
        for what, x in [*((f"argument {i}", x) for i, x in enumerate(args[:n])), ("result", result)]:
            if str(x.dtype).removeprefix("torch.") != dtype:
                wrong.append(f"{name} {what}: {x.dtype}")
        return result

    return noting
