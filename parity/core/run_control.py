"""How far rounding alone moves a run: the specification's run again, from starting weights that are one ulp away.

Training is unstable above some learning rate, and AdamW turns the rounding of a gradient that is all but zero into part
of a step. What a run may differ by is therefore not one number: it is that of one step, or ten times this control where
that is more.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_common.run.checkpoint import TrainingState
from parity import spec_run
from parity.core.compare import Tensors, one_ulp_noise, tensor_errors, worst

Run = tuple[TrainingState, list[dict[str, float]]]  # the state after the last step, and the log of every step

# The roundings of a step are many times that of its weights, and the signs of a few controls are not the worst ones:
# the factor is the design's for trajectories that run free.
FACTOR, CONTROLS = 10.0, 3


def control_runs(
    start: TrainingState, batch: Callable[..., Any], until: int, cfg, opt, separator, seed: int
) -> list[Run]:
    """Runs of the specification from weights moved by one ulp each, other signs in each run."""
    runs = []
    for i in range(CONTROLS):
        noise = one_ulp_noise((seed + 11 * i) % 2**32, "float64")
        with np.errstate(invalid="ignore"):  # a row of the embedding may be infinite by design
            weights = {name: noise(x) for name, x in start.weights.items()}
        state = (weights, start.mu, start.nu, start.step, start.adam_count)
        (w, mu, nu, step, count), rows = spec_run.train(state, batch, until, cfg, opt, separator)
        runs.append((TrainingState(w, mu, nu, step, count), rows))
    return runs


def allowed_error(flat: float, exact: Tensors, controls: list[Tensors]) -> float:
    """The error of tensors that are judged together: that of one step, or what the control explains."""
    return max([flat, *(FACTOR * worst(tensor_errors(control, exact))[1] for control in controls)])


def allowed_errors(flat: float, exact: Mapping[str, Any], controls: list[Mapping[str, Any]]) -> dict[str, float]:
    """The same for numbers that are judged one by one. One that no control has, as a count read on the way, has no
    noise.
    """
    one = lambda numbers, key: {key: np.array(float(numbers[key]))}
    return {key: allowed_error(flat, one(exact, key), [one(x, key) for x in controls if key in x]) for key in exact}
