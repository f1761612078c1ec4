"""The numbers of a training step, read when they are asked for: a device is still computing them when the step
returns.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class StepMetrics(Mapping[str, Any]):
    """loss, grad_norm, lr and skipped of a step. `read` gives them, and waits for the step; it is called at
    most once.
    """

    def __init__(self, read: Callable[[], tuple[float, float, float, bool]]) -> None:
        self._read: Callable[[], tuple] | None = read
        self._values: dict[str, Any] = dict.fromkeys(("loss", "grad_norm", "lr", "skipped"))

    def __getitem__(self, name: str) -> Any:
        if self._read is not None:
            self._values, self._read = dict(zip(self._values, self._read(), strict=True)), None
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
