"""How a tensor of the candidate is made of those of the reference: views that are rearranged, joined, scaled, shifted.

Every map is linear up to its shift and can be turned round, so that weights go either way and gradients through the
adjoint.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """A view of one tensor of the reference.

    take: (axis, start, stop) of each slice. steps: what is then done, in order: ("reshape", shape), ("transpose",
    axes), ("flip", axes), or ("zeros", ()), which keeps the shape alone. beside: zero itself, for the numbers stand in
    another tensor that is added to this one (torch's recurrent cells have two biases); the gradient is theirs.
    """

    leaf: str
    take: tuple[tuple[int, int, int], ...] = ()
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()
    beside: bool = False

    def __call__(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        x = self._taken(leaves[self.leaf])
        for kind, how in self.steps:
            x = _step(x, kind, how)
        return x

    def put(self, leaves: Mapping[str, np.ndarray], value: np.ndarray) -> None:
        """The inverse: write a value, in place, where this part is taken from; what stands beside is added to it."""
        if ("zeros", ()) in self.steps:
            return
        view = x = self._taken(leaves[self.leaf])
        shapes = []
        for kind, how in self.steps:
            shapes.append(x.shape)
            x = _step(x, kind, how)
        for (kind, how), shape in zip(reversed(self.steps), reversed(shapes), strict=True):
            value = _undo(value, kind, how, shape)
        view[...] = view + value if self.beside else value

    def then(self, *steps: tuple[str, Sequence[int]]) -> "Part":
        return replace(self, steps=self.steps + tuple((kind, tuple(how)) for kind, how in steps))

    def sliced(self, axis: int, start: int, stop: int) -> "Part":
        """A slice of the leaf, of a part that has no steps yet."""
        return replace(self, take=(*self.take, (axis, start, stop)))

    def _taken(self, x: np.ndarray) -> np.ndarray:
        for axis, start, stop in self.take:
            x = x[(slice(None),) * axis + (slice(start, stop),)]
        return x

    def __str__(self) -> str:
        if ("zeros", ()) in self.steps:
            return "0"
        taken = "".join(f"[{':, ' * axis}{start}:{stop}]" for axis, start, stop in self.take)
        words = {"reshape": "as", "transpose": "axes", "flip": "flipped along"}
        steps = "".join(
            ", transposed" if (kind, how) == ("transpose", (1, 0)) else f", {words[kind]} {how}"
            for kind, how in self.steps
        )
        return f"{'0 beside ' if self.beside else ''}{self.leaf}{taken}{steps}"


@dataclass(frozen=True)
class Map:
    """A tensor of the candidate: scale * join(parts) + shift.

    join: the axis along which the parts follow each other; None: they are added up.
    """

    parts: tuple[Part, ...]
    join: int | None = 0
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        x = self._joined(leaves, values=True)
        return x if (self.scale, self.shift) == (1, 0) else self.scale * x + self.shift

    def gradient(self, grads: Mapping[str, np.ndarray]) -> np.ndarray:
        """The gradient with respect to the candidate's tensor, given those with respect to the reference's."""
        x = self._joined(grads)
        return (x / len(self.parts) if self.join is None else x) / self.scale

    def put(self, leaves: MutableMapping[str, np.ndarray], tensor: np.ndarray) -> None:
        """The inverse: write the candidate's tensor into the reference's."""
        value = (tensor - self.shift) / self.scale
        if self.join is None:
            for part in self.parts[1:]:
                part.put(leaves, np.zeros_like(value))
            self.parts[0].put(leaves, value)
            return
        start = 0
        for part in self.parts:
            n = part(leaves).shape[self.join] if value.ndim else 1
            at = (slice(None),) * self.join + (slice(start, start + n),) if value.ndim else ()
            part.put(leaves, value[at])
            start += n

    def leaves(self) -> set[str]:
        return {part.leaf for part in self.parts}

    def _joined(self, leaves: Mapping[str, np.ndarray], values: bool = False) -> np.ndarray:
        made = [np.zeros_like(part(leaves)) if values and part.beside else part(leaves) for part in self.parts]
        if len(made) == 1:
            return made[0]
        return sum(made[1:], made[0]) if self.join is None else np.concatenate(made, axis=self.join)

    def __str__(self) -> str:
        text = (" + " if self.join is None else " | ").join(map(str, self.parts))
        if self.scale != 1.0:
            text = f"{self.scale:g} * ({text})"
        return f"{self.shift:g} + {text}" if self.shift else text


@dataclass(frozen=True)
class Given:
    """A function of all leaves by name, of the caller's: it goes one way, and its gradient is found by its values."""

    function: Any

    def __call__(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self.function(leaves))

    def gradient(self, grads: Mapping[str, np.ndarray]) -> np.ndarray:
        """As the function itself, which is right for what only moves numbers."""
        return self(grads)

    def leaves(self) -> set[str]:
        return set()

    def __str__(self) -> str:
        return "a function"


def whole(leaf: str, *steps: tuple[str, Sequence[int]]) -> Map:
    """A map of one leaf."""
    return Map((Part(leaf).then(*steps),))


def _step(x: np.ndarray, kind: str, how: tuple[int, ...]) -> np.ndarray:
    if kind == "reshape":
        return x.reshape(how)
    return np.zeros_like(x) if kind == "zeros" else np.transpose(x, how) if kind == "transpose" else np.flip(x, how)


def _undo(x: np.ndarray, kind: str, how: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    if kind == "reshape":
        return x.reshape(shape)
    return np.transpose(x, np.argsort(how)) if kind == "transpose" else np.flip(x, how)
