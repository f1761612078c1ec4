"""What the judge asks of a side, whatever framework it is written in, and who stands for an object that is handed in.

No framework is imported here: `side_of` looks at what an object is made of and asks the module that knows it.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llm_common.errors import UserError
from parity.judge import trees
from parity.judge.layouts import Layout
from parity.judge.maps import Arrays

MODES = ("eval", "train")
# Arguments by which models are told the mode, and what they are given in training.
MODE_ARGUMENTS = {
    "train": True, "training": True, "is_training": True, "deterministic": False, "eval": False, "inference": False,
    "use_running_average": False,
}  # fmt: skip
Cotangent = Callable[[int, str, tuple[int, ...]], np.ndarray]  # of an output: its number, path and shape


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a side. args and kwargs hold NumPy arrays; real numbers are cast to dtype."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: str
    mode: str = "eval"
    cotangent: Cotangent | None = None  # None: no gradients
    layout: Layout | None = None  # of a candidate

    def leaves(self) -> list[tuple[str, Any]]:
        """(path, leaf) of all arguments; the positional ones are "0", "1", ..."""
        return trees.leaves(self.args) + trees.leaves(self.kwargs)

    def arrays(self) -> dict[int, np.ndarray]:
        """The arguments that are arrays, by their place among all leaves."""
        return {i: np.asarray(x) for i, (_, x) in enumerate(self.leaves()) if isinstance(x, (np.ndarray, np.generic))}

    def filled(self, arrays: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with other arrays in their places."""
        places = iter(range(len(self.leaves())))

        def other(leaf):
            place = next(places)
            return arrays.get(place, leaf)

        return tuple(trees.mapped(other, list(self.args))), trees.mapped(other, dict(self.kwargs))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave, in float64. Gradients are of the sum of all outputs, each times its cotangent."""

    outputs: list[tuple[str, np.ndarray]]
    gradients: Arrays  # of parameters, by name
    input_gradients: Arrays  # of inputs, by path
    state: Arrays  # after the run


class Side(Protocol):
    """One implementation."""

    framework: str  # "JAX", "torch" or "NumPy"
    parameters: Arrays  # what is trained, float64, in the side's own order
    state: Arrays  # buffers and statistics that are real numbers, float64
    frozen: frozenset[str]  # parameters without gradients

    def run(self, parameters: Arrays, state: Arrays, call: Call) -> Result:
        """Run with these parameters and this state; the side itself stays as it was."""
        ...

    def shapes(self, parameters: Arrays, state: Arrays, call: Call) -> list[tuple[str, tuple[int, ...]]]:
        """(path, shape) of the outputs."""
        ...

    def narrow(self, parameters: Arrays, state: Arrays, call: Call) -> list[str]:
        """Operations that compute in a narrower dtype than the call's, by name."""
        ...


def side_of(given: Any) -> Side:
    """The side of an object: a module, (module, weights), (function, weights), or a `Side`.

    Raises UserError for what none of the frameworks knows.
    """
    if hasattr(given, "run") and hasattr(given, "narrow"):
        return given
    model, weights = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if is_torch(model) or _holds_torch(weights):
        from parity.judge.torch_side import torch_side

        return torch_side(model, weights)
    if isinstance(model, type):
        raise UserError(f"{model.__name__} is a class: give an instance of it")
    if not callable(model) and not hasattr(model, "apply"):
        raise UserError(
            f"a {type(model).__name__} is no model: give a module, or (module, weights), or (function, weights)"
        )
    if weights is None and _makes_a_model(model):
        made: Any = model
        return side_of(made())
    from parity.judge.jax_side import jax_side

    return jax_side(model, weights)


def _makes_a_model(model: Any) -> bool:
    """Whether a function takes nothing, and so can only be one that makes a model."""
    return inspect.isfunction(model) and not inspect.signature(model).parameters


def is_torch(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _holds_torch(weights: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and any(isinstance(leaf, torch.Tensor) for _, leaf in trees.leaves(weights))


def mode_arguments(names: Sequence[str], given: Mapping[str, Any], mode: str) -> dict[str, bool]:
    """What a model is told of the mode, by those of its arguments that speak of it and were not given."""
    return {
        name: value if mode == "train" else not value
        for name, value in MODE_ARGUMENTS.items()
        if name in names and name not in given
    }


class NumpySide:
    """A NumPy function (weights by name, *inputs): outputs alone, in the dtype that its inputs have."""

    framework = "NumPy"

    def __init__(self, function: Callable[..., Any], weights: Mapping[str, np.ndarray]) -> None:
        self.function, self.frozen = function, frozenset[str]()
        self.parameters = {name: trees.exact(x) for name, x in weights.items()}
        self.state: Arrays = {}

    def run(self, parameters: Arrays, state: Arrays, call: Call) -> Result:
        kind = np.dtype(call.dtype if call.dtype in ("float32", "float64") else "float32")
        cast = lambda x: x.astype(kind) if trees.is_float(x) else x
        args, kwargs = call.filled({i: cast(x) for i, x in call.arrays().items()})
        found = self.function({name: x.astype(kind) for name, x in parameters.items()}, *args, **kwargs)
        outputs = [(path, trees.exact(x)) for path, x in trees.leaves(found) if trees.is_array(x)]
        return Result(outputs, {}, {}, dict(state))

    def shapes(self, parameters: Arrays, state: Arrays, call: Call) -> list[tuple[str, tuple[int, ...]]]:
        return [(path, x.shape) for path, x in self.run(parameters, state, call).outputs]

    def narrow(self, parameters: Arrays, state: Arrays, call: Call) -> list[str]:
        return []
