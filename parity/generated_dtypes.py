"""The dtypes of tensors in a model that generates, seen at the functions it calls; imports neither framework."""

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

# Functions of the model, and how many of their first arguments are activations, the cache's keys and values among them.
GENERATED = (("attention", "dot_product_attention", 3), ("layers", "rms_norm", 2), ("layers", "swiglu", 2))


@contextlib.contextmanager
def noted_dtypes(package: str, dtype: str) -> Iterator[list[str]]:
    """A list to which, while this is open, what has another dtype is added: function, which tensor, its dtype.

    Nothing is seen of programs that were compiled before.
    """
    wrong: list[str] = []
    with contextlib.ExitStack() as stack:
        for module, function, n in GENERATED:
            stack.enter_context(_noting(f"{package}.{module}", function, n, dtype, wrong))
        yield wrong


def _noting(module: str, name: str, n: int, dtype: str, wrong: list[str]):
    """A patch: the function, which notes those of its first n arguments and its result that have another dtype."""
    function = getattr(importlib.import_module(module), name)

    def noting(*args, **kwargs):
        result = function(*args, **kwargs)
        for what, x in [*((f"argument {i}", x) for i, x in enumerate(args[:n])), ("result", result)]:
            if str(x.dtype).removeprefix("torch.") != dtype:
                wrong.append(f"{name} {what}: {x.dtype}")
        return result

    return mock.patch(f"{module}.{name}", noting)
