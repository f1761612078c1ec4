"""A user's own tests before planted bugs: `parity mutants --pytest`."""

import pytest

from llm_common.errors import UserError
from parity.mutants.generated import campaign, user_tests

LOGITS = """
import numpy as np
from parity.core.inputs import random_batch, random_weights
from parity.sides.settings import Settings


def test_logits():
    s = Settings()
    weights, (ids, _) = random_weights(s.cfg, 0, "float32"), random_batch(s.cfg, 0, 2, 5)
    np.testing.assert_allclose(*(side.logits(weights, ids) for side in s.sides("float32")), atol={atol})
"""


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        user_tests.run_user_tests(tmp_path / "test_none.py")


@pytest.mark.parametrize(
    ("text", "why"), [("def test_a():\n    assert 0\n", "test_a fails without"), ("x = 1\n", "no test in it")]
)
def test_tests_that_do_not_pass_without_a_bug_are_refused(tmp_path, text, why):
    file = tmp_path / "test_mine.py"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=why):
        user_tests.run_user_tests(file, jobs=1)


def test_the_checks_that_see_most_for_their_seconds_are_proposed_first(monkeypatch):
    seconds = {"adamw float64": 10.0, "tokens float64": 1.0, "loss float64": 1.0}
    monkeypatch.setattr(user_tests, "processes", lambda jobs: _Pool())
    monkeypatch.setattr(user_tests, "_seconds", seconds.__getitem__)
    of = lambda check, test, n: [user_tests.Seen(f"{check} {i}", "area", "JAX", check, test) for i in range(n)]
    found = [*of("adamw float64", "", 5), *of("tokens float64", "", 3), *of("loss float64", "", 1)]
    found += of("logits float64", "test_logits", 9) + of("", "", 2)
    assert [(one.check, one.sees) for one in user_tests.proposals(found)] == [
        ("tokens float64", 3),
        ("loss float64", 1),
        ("adamw float64", 5),
    ]


@pytest.mark.slow
def test_a_test_of_logits_sees_zeros_and_no_optimizer(tmp_path, monkeypatch):
    file = tmp_path / "test_mine.py"
    file.write_text(LOGITS.format(atol=1e-4), encoding="utf-8")
    always = [bug for bug in user_tests.bugs() if bug.area == "does nothing"]
    monkeypatch.setattr(user_tests, "bugs", lambda: always)
    generated = [next(m for m in campaign.population(("torch_llm/rope.py",)) if m.operator == "arithmetic")]
    found = user_tests.run_user_tests(file, generated, jobs=2)
    seen = {(one.name, one.side): "test_logits" in one.test for one in found[: len(always)]}
    assert seen == {(bug.name, bug.side): "optimizer" not in bug.name for bug in always}
    assert found[-1].side == "torch"
    assert not found[-1].through


class _Pool:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, call, argument):
        value = call(argument)
        return type("Done", (), {"result": lambda self: value})()
