"""For other people's tests: "the candidate is the reference" as one assertion.

from parity.judge import assert_same

def test_the_port():
    assert_same(reference=(FlaxModel(), variables), candidate=TorchModel(), inputs=[x])
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_common.errors import UserError
from parity.judge.judge import judge
from parity.judge.verdict import Verdict


def assert_same(reference: Any, candidate: Any, inputs: Sequence[Any] | Mapping[str, Any], **more: Any) -> Verdict:
    """Raise AssertionError with the verdict's text unless both are the same program. Takes what `judge` takes."""
    __tracebackhide__ = True  # pytest then shows the line of the test
    for name in ("rtol", "atol"):
        if name in more:
            raise UserError(
                f"{name}: there is no tolerance to choose. What may differ is measured on the reference: what one ulp "
                "in its weights and inputs does to it. A known difference is said by names=, layout= or mask="
            )
    verdict = judge(reference, candidate, inputs, **more)
    if not verdict:
        raise AssertionError(verdict.text())
    return verdict
