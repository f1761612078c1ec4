"""The suite sees planted bugs: the quick ones of the catalogue here, all of them in the slow test and in `parity
mutants`.
"""

import ast

import pytest

import llm_common.rope
import parity.core.planting
import torch_llm.layers
from llm_common.config import preset
from llm_common.errors import UserError
from parity.checks.ladder import run_checks
from parity.core.compare import JAX, SHARED, TORCH
from parity.core.planting import AnchorError, Edit, planted
from parity.mutants.catalogue import EQUIVALENTS, MUTANTS, Mutant
from parity.mutants.score import EFFECT_WANTED, clean_run, plant_all, run_mutant, score, select, smallest_effects
from parity.sides.settings import Settings

QUICK = [m for m in MUTANTS if m.quick]


@pytest.mark.parametrize("mutant", QUICK, ids=lambda m: m.name)
def test_a_planted_bug_is_caught_at_its_check_on_its_side_at_its_place(mutant):
    outcome = run_mutant(mutant)
    assert outcome.ok, (outcome.found, outcome.note, outcome.effect)
    assert outcome.effect >= EFFECT_WANTED


@pytest.mark.parametrize("level", sorted({(m.runs or m.check, m.dtype) for m in QUICK}))
def test_without_a_bug_the_same_checks_are_green(level):
    assert clean_run(level).found == ("", "", "")


@pytest.mark.parametrize("mutant", EQUIVALENTS[:3], ids=lambda m: m.name)
def test_what_is_equal_by_mathematics_stays_green(mutant):
    outcome = run_mutant(mutant)
    assert outcome.found == ("", "", ""), outcome.note


@pytest.mark.slow
def test_the_whole_catalogue():
    outcomes = plant_all([*MUTANTS, *EQUIVALENTS])
    assert [(o.name, o.found, o.note) for o in outcomes if not o.ok] == []
    assert score(outcomes)["caught"] == len(MUTANTS)
    assert all(effect >= EFFECT_WANTED for effect, _ in smallest_effects(outcomes).values())


def test_the_catalogue_is_as_large_as_it_says_and_every_anchor_fits():
    assert len(MUTANTS) >= 240
    assert sum(m.side not in (JAX, TORCH) for m in MUTANTS) >= 100
    names = [(m.area, m.name, m.side) for m in MUTANTS]
    assert len(set(names)) == len(names)
    for mutant in (*MUTANTS, *EQUIVALENTS):
        with planted(mutant.edits):
            pass


def test_a_compiled_program_with_a_bug_goes_red_too(fresh):
    """The mutants run uncompiled; what people run is compiled."""
    bug = next(m for m in MUTANTS if m.name == "gate and up swapped")
    settings = Settings(dtypes=("float64",), noise=False)
    with planted(bug.edits):
        rows = run_checks(settings, ("logits",))
    assert {row.side for row in rows} == {JAX}
    assert [row.place for row in rows[:2]] == ["model.layers.0.mlp"] * 2


# --- planting


def test_the_function_is_changed_for_everybody_and_put_back():
    before = llm_common.rope.rope_table(preset("tiny"), 3)[0][1, 0]
    edit = Edit("llm_common.rope:rope_table", "np.cos(angles)", "2 * np.cos(angles)")
    with planted([edit]):
        from torch_llm.rope import rope_table

        assert rope_table(preset("tiny"), 3)[0][1, 0] == 2 * before
    assert llm_common.rope.rope_table(preset("tiny"), 3)[0][1, 0] == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("torch_llm.layers:rms_norm", "h * 7", "h"), "is there 0 times"),
        (Edit("torch_llm.layers:rms_norm", "h", "x"), "is there . times"),
        (Edit("torch_llm.layers:no_such_function", "h", "x"), "no such function"),
        (Edit("torch_llm.nowhere:f", "h", "x"), "no such function"),
        (Edit("torch_llm.optim:AdamW.gone", "h", "x"), "no such function"),
    ],
)
def test_an_anchor_that_is_gone_or_twice_there_fails_loudly(edit, message):
    code = torch_llm.layers.rms_norm.__code__
    with pytest.raises(AnchorError, match=message), planted([edit]):
        pass
    assert torch_llm.layers.rms_norm.__code__ is code


def test_layout_and_comments_play_no_part(monkeypatch):
    source = "def f(x):\n    # a comment\n    return (x +\n        1)  # another\n"
    monkeypatch.setattr(parity.core.planting, "_source", lambda function: source)
    definition = ast.parse(source).body[0]
    parity.core.planting._replace(definition, Edit("m:f", "x + 1", "x - 1"))  # type: ignore[arg-type]
    assert ast.unparse(definition) == "def f(x):\n    return x - 1"


def test_an_error_inside_a_planted_bug_takes_it_out_again():
    edit = Edit("llm_common.schedule:learning_rate", "cfg.lr_min", "cfg.lr_max")
    code = __import__("llm_common.schedule").schedule.learning_rate.__code__
    with pytest.raises(AnchorError), planted([edit, Edit("llm_common.schedule:gone", "a", "b")]):
        pass
    assert __import__("llm_common.schedule").schedule.learning_rate.__code__ is code


def test_words_select_and_unknown_ones_are_an_error():
    assert {m.area for m in select(["clip:"])} == {"clip"}
    assert all(m.quick for m in select(quick=True))
    with pytest.raises(UserError, match="no planted bug is called"):
        select(["no such thing"])


def test_a_bug_that_is_not_seen_is_not_counted_as_caught():
    """The suite's own alarm: an edit that changes nothing must be reported as missed."""
    import dataclasses

    harmless = dataclasses.replace(
        QUICK[0], edits=(Edit("jax_llm.rope:apply_rope", "x2 * cos + x1 * sin", "x1 * sin + x2 * cos"),)
    )
    outcome = run_mutant(harmless)
    assert not outcome.caught
    assert not outcome.ok
    blamed_wrongly = dataclasses.replace(QUICK[0], side=SHARED)
    assert not run_mutant(blamed_wrongly).ok


def test_a_bug_of_the_pass_without_gradients_is_placed_too():
    edit = Edit(
        "torch_llm.fast.products:lean_embedding",
        "F.embedding(input_ids, weight)",
        "F.embedding(input_ids, weight) * 1.0001",
    )
    outcome = run_mutant(Mutant("x", "x", (edit,), "logits", TORCH, "model.embed_tokens"))
    assert outcome.ok, (outcome.found, outcome.note)
    assert outcome.note.startswith("without gradients torch differs first at model.embed_tokens")
