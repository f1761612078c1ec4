"""The rule of skipped updates, applied one step late, so that a device always has work."""

from collections.abc import Callable
from typing import Any

from llm_common.errors import UserError
from llm_common.run.metrics import StepMetrics


class PreviousStep:
    """The step before the one that has just been begun. Nobody waits for it earlier.

    count: the updates made until the step before it. A step whose gradient norm is not finite makes none.
    """

    def __init__(self, count: int, max_skipped_steps: int) -> None:
        self.count, self.max_skipped_steps = count, max_skipped_steps
        self._skipped_in_row = 0
        self._begun: tuple[int, StepMetrics, tuple[Any, ...]] | None = None

    def begin(self, number: int, metrics: StepMetrics, *batch: Any) -> None:
        """A step is under way, and becomes the previous one. number: from 1."""
        self._begun = number, metrics, batch

    def resolve(self, first_not_finite: Callable[..., str]) -> None:
        """Wait for it and count its update. Raises UserError if it was the last of too many without one.

        first_not_finite: says of its batch, for people, which tensor is the first that is not finite.
        """
        if self._begun is None:
            return
        (number, metrics, batch), self._begun = self._begun, None
        self.count += not metrics["skipped"]
        self._skipped_in_row = self._skipped_in_row + 1 if metrics["skipped"] else 0
        if self._skipped_in_row >= self.max_skipped_steps:
            raise UserError(
                f"the gradient norm was not finite in {self._skipped_in_row} steps in a row (to step {number}): "
                f"{first_not_finite(*batch)}; "
                "lower lr_max, lengthen warmup_steps, or look for bad tokens in the data"
            )
