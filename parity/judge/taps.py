"""What passes the borders of modules, and other values in its place: so each module is judged alone."""

from collections import Counter
from typing import Any

import numpy as np

from parity.judge.layouts import Layout

Key = tuple[str, str]  # a module, and "in" or "out"
Values = dict[Key, np.ndarray]


class Taps:
    """The first run of every module: its first input and its first output, and their gradients, in float64.

    given, given_back: what is handed on instead, in the reference's layout; layout: of a candidate.
    """

    def __init__(
        self, given: Values | None = None, given_back: Values | None = None, layout: Layout | None = None
    ) -> None:
        self.given, self.given_back = given or {}, given_back or {}
        self.layout = layout or Layout()
        self.forward: Values = {}
        self.backward: Values = {}
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []  # in which modules end

    def enters(self, module: str) -> bool:
        """Whether this run of a module is the one that is looked at."""
        self.calls[module] += 1
        return self.calls[module] == 1

    def ends(self, module: str) -> bool:
        first = self.calls[module] == 1 and module not in self.order
        if first:
            self.order.append(module)
        return first

    def store(self, kind: Values, key: Key, x: Any) -> None:
        kind.setdefault(key, np.array(x, np.float64))

    def instead(self, values: Values, key: Key, shape: tuple[int, ...]) -> np.ndarray | None:
        """What is handed on, laid out for a tensor of this shape; None if nothing fits."""
        x = values.get(key)
        if x is None:
            return None
        turned = self.layout.output(x, shape)
        return turned if turned.shape == shape else x if x.shape == shape else None
