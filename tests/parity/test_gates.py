"""Published gates: each passes on correct code, and what they let through is counted, not assumed."""

import dataclasses

import numpy as np
import pytest

from parity.mutants import gates
from parity.mutants.catalogue import EQUIVALENTS
from parity.mutants.score import run_mutant

NAMES = {gate.who for gate in gates.GATES}
BUGS = {(bug.name, bug.side): bug for bug in gates.bugs()}


def test_near_is_elementwise_and_nan_is_near_nothing():
    one = np.ones(3)
    assert gates.near([(one, one + 9e-3)], 1e-2)
    assert not gates.near([(one, one + 2e-2)], 1e-2)
    assert gates.near([(100 * one, 100 * one + 0.5)], 0.0, 1e-2)
    assert not gates.near([(one, one * np.nan)], 1.0, 1.0)
    assert not gates.near([(one * np.nan, one)], 1.0, 1.0)
    assert not gates.near([(one, np.ones(1))], 1.0)


def test_a_gate_passes_equal_code_and_refuses_zeros():
    quick = [gate for gate in gates.GATES if gate.who in ("KernelBench, JAXBench", "MaxCode", "torchtitan, pass")]
    equal = next(m for m in EQUIVALENTS if m.check == "model")
    assert set(gates.judge(equal, gates=quick).let_through) == {gate.who for gate in quick}
    assert gates.judge(BUGS["logits are zeros", "torch"], gates=quick).let_through == ()


@pytest.mark.slow
def test_every_gate_passes_equal_code_and_sees_zeros_or_is_said_not_to():
    zeros = gates.judge(BUGS["logits are zeros", "torch"])
    assert set(zeros.let_through) == {"AlgoPerf", "torchax", "levanter, AdamW"}
    equal = next(m for m in EQUIVALENTS if m.check == "model")
    assert set(gates.judge(equal).let_through) == NAMES


def test_the_page_counts_what_was_judged(tmp_path):
    verdicts = [
        gates.Verdict("a", "norm", "JAX", ("AlgoPerf", "keras")),
        gates.Verdict("b", "norm", "torch", tuple(NAMES)),
        gates.Verdict("c", gates.EQUAL, "", tuple(NAMES - {"MaxCode"})),
    ]
    page = gates.markdown(verdicts)
    line = next(x for x in page.splitlines() if x.startswith("| AlgoPerf | tests"))
    assert "| 0 of 2 | 0 % | 0 of 1 |" in line
    line = next(x for x in page.splitlines() if x.startswith("| MaxCode | generated"))
    assert "| 1 of 2 | 50 % | 1 of 1 |" in line
    assert "norm: b (torch)" in page
    gates.draw(verdicts, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes()[1:4] == b"PNG"


def test_at_least_ten_projects_are_measured_and_one_sided_bugs_alone():
    assert len({gate.who.split(",")[0] for gate in gates.GATES}) >= 9
    assert len(gates.GATES) >= 10
    assert {bug.side for bug in BUGS.values()} == {"JAX", "torch"}


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in BUGS.values() if bug.area == "does nothing"], ids=str)
def test_the_ladder_sees_what_does_nothing(bug):
    check = "adamw" if "optimizer" in bug.name else "logits"
    runs = "resume" if check == "adamw" else ""  # whole steps, not the transformation alone
    found = run_mutant(dataclasses.replace(bug, check=check, runs=runs))
    assert found.caught
    assert found.right_side
