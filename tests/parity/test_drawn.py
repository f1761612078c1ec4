"""Cases nobody chose: pairs that are covered, cases that shrink, lines that repeat them, bugs that they find
and name.
"""

import numpy as np
import pytest

from llm_common.errors import UserError
from parity.checks.fuzz import Drawn, corpus, draw, judge, judge_and_explain, seconds_of
from parity.checks.run_cases import covering_cases
from parity.commands.cli import main
from parity.core import drawn
from parity.core.case_space import SPACES, fix
from parity.core.planting import Edit, planted
from parity.sides.settings import Settings

SPACE = {"a": (0, 1, 2), "b": (False, True), "c": ("x", "y", "z"), "d": (1.0, 2.0)}
free = lambda case: case
never_both = lambda case: {**case, "b": False} if case["a"] == 2 else case


@pytest.mark.parametrize("rule", [free, never_both])
def test_every_pair_that_can_meet_does(rule):
    cases = drawn.covering(SPACE, rule)
    assert all(case == rule(case) for case in cases)
    met = set().union(*(drawn.pairs_of(SPACE, case) for case in cases))
    assert set(drawn.reachable_pairs(SPACE, rule)) <= met
    assert (("a", 2), ("b", 1)) not in met or rule is free
    assert len(cases) < 16  # of 36
    assert drawn.covering(SPACE, rule) == cases


@pytest.mark.parametrize("kind", ["run", "text"])
def test_the_ladders_cases_have_every_family_with_every_feature(kind):
    cases = covering_cases(kind, full=False)
    assert all(case == fix(case) for case in cases)
    if kind == "run":
        for family in SPACES[kind]["family"]:
            mine = [case for case in cases if case["family"] == family]
            for name in ("micro_batches", "chunks", "separators", "remat", "scan", "resumed", "clip"):
                assert {case[name] for case in mine} >= set(SPACES[kind][name][:2]), (family, name)


def test_a_case_shrinks_to_what_it_cannot_do_without():
    fails = lambda case: case["a"] >= 1 and case["c"] != "x"
    small = drawn.shrink({"a": 2, "b": True, "c": "z", "d": 2.0}, SPACE, free, fails)
    assert small == {"a": 1, "b": False, "c": "y", "d": 1.0}
    assert drawn.needed(small, SPACE) == ["a", "c"]


def test_a_line_repeats_a_case():
    rng = np.random.default_rng(0)
    for kind, space in SPACES.items():
        case = drawn.draw(space, rng, fix)
        features = {name: case[name] for name in drawn.needed(case, space)}
        assert Drawn.parse(f"{kind} 7 {drawn.to_line(features)}").case() == case
    assert draw(3, 1) == draw(3, 1) != draw(7, 1)
    assert Drawn.parse('run 1 {"layers":true,"tied":1}').case()["tied"] is True
    assert all(one.case() for one in corpus())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("walk 1 {}", "expected KIND SEED JSON"),
        ("run x {}", "expected KIND SEED JSON"),
        ("run 1 {", "not JSON"),
        ("run 1 []", "not an object"),
        ('run 1 {"colour":1}', "unknown feature 'colour'; known: family"),
        ('run 1 {"layers":7}', "layers = 7 is not one of 1, 2, 3"),
    ],
)
def test_a_line_that_is_no_case_is_refused(line, words):
    with pytest.raises(UserError, match=words):
        Drawn.parse(line)


def test_a_time_is_read():
    assert [seconds_of(x) for x in ("30m", "90s", "2h", "45")] == [1800, 90, 7200, 45]
    for text in ("soon", "-1m", "0", "", "nan"):
        with pytest.raises(UserError, match="expected a time"):
            seconds_of(text)


# none of these is in the catalogue; each shows only with the settings of its case
BUGS = [
    (
        Edit("torch_llm.engine.gradients:loss_and_grads", "loss.backward()", "model.zero_grad()\nloss.backward()"),
        'run 3 {"family":"qwen2","micro_batches":3,"chunks":3,"remat":"full"}',
        "torch",
        "loss_and_grads (accumulation)",
        '{"micro_batches":3}',
    ),
    (
        Edit("jax_llm.params:head_weight", '"lm_head" in params', "False"),
        'run 3 {"layers":2,"chunks":3,"micro_batches":3,"betas":[0.8,0.99]}',
        "JAX",
        "chunked_cross_entropy",
        '{"chunks":3}',
    ),
]


@pytest.mark.parametrize(("edit", "line", "side", "place", "smallest"), BUGS, ids=["torch", "JAX"])
def test_a_bug_that_only_some_settings_show_is_found_and_made_small(edit, line, side, place, smallest):
    one, settings = Drawn.parse(line), Settings()
    assert judge(settings, one).ok
    with planted([edit]):
        import jax

        from parity.sides.jax_side import clear_caches

        clear_caches()
        try:
            row = judge_and_explain(settings, one)
        finally:
            jax.clear_caches()
            clear_caches()
    assert not row.ok
    assert (row.side, row.place) == (side, place), row
    assert f"parity run --case 'run 3 {smallest}'" in row.note


def test_the_command_line_runs_one_case(capsys):
    assert main(["run", "--case", 'text 1 {"temperature":0.0}']) == 0
    assert "text temperature 0.0" in capsys.readouterr().out
