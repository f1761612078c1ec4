"""For other people's tests: "these two agree" as one assertion.

from parity.pair import assert_same

def test_the_port():
    assert_same(FlaxModel(), TorchModel(), inputs=[x], params=params)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from parity.pair.pair import Comparison, Pair


def assert_same(jax: Any, torch: torch.nn.Module, inputs: Sequence[np.ndarray], **more: Any) -> Comparison:
    """Raise AssertionError, with the figures that differ and the module where they part, unless both sides agree.

    Takes what `parity.pair.Pair` takes: params, names, weights, optimizers, witness, dtypes, ... Returns the
    comparison.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    comparison = Pair(jax, torch, inputs, **more).compare()
    if not comparison.ok:
        bad = [
            f"  {row.check}, {row.item} {row.dtype}: {row.measured:.1e}, allowed {row.allowed:.1e} {row.note}"
            for row in comparison.rows
            if not row.ok
        ]
        matched = [f"  {name} = {how}" for name, how in comparison.matching.how.items()]
        raise AssertionError("\n".join([comparison.verdict(), *bad, "matched:", *matched]))
    return comparison
