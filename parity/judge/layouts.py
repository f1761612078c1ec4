"""Where the channels lie: "NHWC->NCHW" says how inputs and outputs of the reference become the candidate's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_common.errors import UserError
from parity.judge import trees

COMMON = ("NHWC->NCHW", "NCHW->NHWC", "NLC->NCL", "NCL->NLC", "NDHWC->NCDHW", "NCDHW->NDHWC")


@dataclass(frozen=True)
class Layout:
    """axes: candidate's axis i is the reference's axis axes[i]; of arrays with as many axes, others stay."""

    text: str = ""
    axes: tuple[int, ...] = ()

    def input(self, x: np.ndarray, back: bool = False) -> np.ndarray:
        if not self.axes or x.ndim != len(self.axes):
            return x
        return np.transpose(x, np.argsort(self.axes) if back else self.axes)

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        turn = lambda x: (
            self.input(x) if isinstance(x, np.ndarray) and (trees.is_float(x) or trees.is_complex(x)) else x
        )
        return tuple(trees.mapped(turn, list(args))), trees.mapped(turn, dict(kwargs))

    def output(self, x: np.ndarray, shape: tuple[int, ...], back: bool = False) -> np.ndarray:
        """An output laid out as the candidate has it, or back as the reference; singleton axes as `shape` has them."""
        x = self.input(x, back)
        if x.shape != shape and _without_ones(x.shape) == _without_ones(shape):
            x = x.reshape(shape)
        return x

    def of_output(self, shape: tuple[int, ...], back: bool = False) -> tuple[int, ...]:
        """The shape that an output has on the other side."""
        if not self.axes or len(shape) != len(self.axes):
            return shape
        order = np.argsort(self.axes) if back else self.axes
        return tuple(shape[i] for i in order)

    def fits(self, ours: Sequence[tuple[str, tuple[int, ...]]], theirs: Sequence[tuple[str, tuple[int, ...]]]) -> bool:
        """Whether the candidate's outputs have the shapes that the reference's are expected to have there."""
        by_path = dict(theirs)
        if dict(ours).keys() == by_path.keys():
            theirs = [(path, by_path[path]) for path, _ in ours]
        return len(ours) == len(theirs) and all(
            _without_ones(self.of_output(a)) == _without_ones(b) for (_, a), (_, b) in zip(ours, theirs, strict=True)
        )


def read_layout(text: str | None) -> Layout:
    """Raises UserError unless both sides of the arrow have the same letters, each once."""
    if text is None:
        return Layout()
    left, arrow, right = text.replace(" ", "").partition("->")
    if not arrow or sorted(left) != sorted(right) or len(set(left)) != len(left):
        raise UserError(f"layout = {text!r}: the same letters on both sides of an arrow are needed, as NHWC->NCHW")
    return Layout(f"{left}->{right}", tuple(left.index(letter) for letter in right))


def found_layout(args: Any, kwargs: Any) -> list[Layout]:
    """The usual layouts that inputs with so many axes may have."""
    ndims = {
        x.ndim
        for _, x in [*trees.leaves(args), *trees.leaves(kwargs)]
        if isinstance(x, np.ndarray) and trees.is_float(x)
    }
    found = [read_layout(text) for text in COMMON]
    return [layout for layout in found if len(layout.axes) in ndims]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1) or ((1,) if math.prod(shape) else shape)
