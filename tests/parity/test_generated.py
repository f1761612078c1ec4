"""Generated mutants: what is drawn, that it is planted, and what is said of it."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from parity.mutants.generated import campaign, table
from parity.mutants.generated.operators import mutations
from parity.mutants.generated.scope import IN, OUT, OUT_FUNCTIONS

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""A file with 1 of everything."""
import math
LIMIT: int = 3

def f(q, k, v, *, eps=1e-5, axis=-1, on=True) -> int:
    """q + k."""
    check_length(q + 1, k)
    if q > 5:
        raise ValueError(f"q = {q + 1}")
    assert q < 6
    print("said", q + 2)
    x = g(q, k, axis=-1).astype(np.float32)
    x = x[1:k] * cfg.beta2
    v += x
    if on and not x:
        v = v + x
    return h(q, k) if q <= k else -v % 2
'''


def drawn(source=SOURCE):
    return mutations("a.py", source, {"beta2": 0.95})


def edits(operator, source=SOURCE):
    return {(" ".join(m.old.split()), m.new) for m in drawn(source) if m.operator == operator}


def test_every_operator_makes_the_edits_that_it_is_for():
    assert edits("comparison") == {("<=", "<"), ("<=", ">=")}
    assert {("*", "/"), ("+", "-"), ("%", "//"), ("-v", "v")} <= edits("arithmetic")
    assert edits("constant") == {("1e-05", "2e-05")} or ("1e-5", "2e-05") in edits("constant")
    assert ("True", "False") in edits("constant")
    assert {("3", "4"), ("3", "2"), ("1", "0"), ("k", "k + 1")} <= edits("off by one")
    assert ("-1", "0") in edits("axis")
    assert {("np.float32", "np.bfloat16")} <= edits("dtype")
    assert ("g(q, k, axis=-1).astype(np.float32)", "g(q, k, axis=-1)") in edits("dtype")
    assert {(", axis=-1", ""), (", k", "")} <= edits("argument dropped")
    assert ("q, k", "k, q") in edits("argument swapped")
    assert {("v += x", "pass"), ("and not x", "")} <= edits("statement deleted")
    assert ("cfg.beta2", "0.95") in edits("default used")
    assert ("on and not x", "not (on and not x)") in edits("condition negated")
    assert {("q", "k"), ("k", "v")} <= edits("wrong twin variable")


def test_what_decides_no_number_is_left_alone():
    lines = SOURCE.splitlines()
    untouched = ("A file with", "import", "q + k.", "check_length", "q > 5", "raise", "assert", "print")
    for one in drawn():
        assert not any(word in lines[one.line - 1] for word in untouched), one


def test_every_edit_changes_the_tree_and_names_stay_when_other_lines_come():
    names = {m.name for m in drawn()}
    assert len(names) == len(drawn()) > 50
    for one in drawn():
        assert ast.dump(ast.parse(one.apply(SOURCE))) != ast.dump(ast.parse(SOURCE))
    assert {m.name for m in drawn("# before\n" + SOURCE + "\ny = 1\n")} >= names
    with pytest.raises(ValueError, match="not there any more"):
        drawn()[5].apply(SOURCE.replace("def f", "def longer"))


def test_every_file_is_in_scope_or_out_of_it_for_a_reason():
    files = {
        str(p.relative_to(ROOT)) for name in ("jax_llm", "torch_llm", "llm_common") for p in (ROOT / name).rglob("*.py")
    }
    assert files == (IN.keys() | OUT.keys()) - {"llm_tools"}
    assert not IN.keys() & OUT.keys()
    for file, function in OUT_FUNCTIONS:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert any(getattr(node, "name", "") == function for node in tree.body), (file, function)
    everyone = campaign.population()
    assert len(everyone) == len({m.name for m in everyone}) > 5000
    assert {m.file for m in everyone} <= IN.keys()


def test_a_larger_sample_begins_with_the_smaller_one():
    assert campaign.drawn(30, 3) == campaign.drawn(60, 3)[:30] != campaign.drawn(30, 4)


def test_what_is_called_equivalent_is_still_there():
    names = {m.name for m in campaign.population()}
    for name, reason in (table.reasons() | table.reasons(gpu=True)).items():
        assert name in names, f"{name}: its line has changed; read it again"
        assert len(reason) > 15


def _ask(servers, file, old, new, checks=("whole schedule",), limit=60.0):
    text = (ROOT / file).read_bytes()
    assert text.count(old.encode()) == 1
    start = text.index(old.encode())
    job = {"goes": campaign.GOES, "checks": list(checks), "limits": dict.fromkeys(checks, limit)}
    edit = {"file": file, "start": start, "end": start + len(old.encode()), "new": new}
    return servers.ask(servers.processes[0], job | edit)


def test_a_mutant_is_planted_judged_and_gone(tmp_path):
    with campaign.Servers(1, str(tmp_path)) as servers:
        file = "llm_common/schedule.py"
        source = (ROOT / file).read_text(encoding="utf-8")
        line = next(x for x in source.splitlines(keepends=True) if x.lstrip().startswith("return cfg.lr_min"))
        indent = line[: len(line) - len(line.lstrip())]
        red = _ask(servers, file, line, f"{indent}return 2 * cfg.lr_min\n")
        assert red["red"]["check"] == "schedule"
        assert not red["late"]
        same = _ask(servers, file, line, f"{indent}pass\n{line}")
        assert same["green"]
        assert "red" not in same
        late = _ask(servers, file, line, f"{indent}while True: pass\n", limit=2.0)
        assert late["late"]
        broken = _ask(servers, file, "import math\n", "import mathematics\n")
        assert "ModuleNotFoundError" in broken["raised"]
        again = _ask(servers, file, line, f"{indent}pass\n{line}")
        assert again["green"]
    assert (ROOT / file).read_text(encoding="utf-8") == source


ONE = campaign.Outcome(
    "00000001", "jax_llm/rope.py", "apply_rope", "axis", 3, "-1", "0", "row", side="JAX", place="rope"
)


def test_the_sentence_counts_each_once(monkeypatch):
    known = {"00000004": "nothing", "00000001": "killed all the same"}
    monkeypatch.setattr(table, "reasons", lambda gpu=False: {} if gpu else known)
    others = [
        dataclasses.replace(ONE, name="00000002", how="row", side="torch", place="mlp"),
        dataclasses.replace(ONE, name="00000003", how="error", side="JAX", place="apply_rope"),
        dataclasses.replace(ONE, name="00000004", how="survived"),
        dataclasses.replace(ONE, name="00000005", how="survived"),
        dataclasses.replace(ONE, name="00000006", how="tests"),
        dataclasses.replace(ONE, name="00000007", file="llm_common/rope.py", how="late"),
    ]
    found = table.summary([ONE, *others])
    assert found["drawn"] == 7
    assert found["equivalent"] == 1
    assert (found["judged"], found["parity"], found["tests alone"], found["survived"]) == (6, 4, 1, 1)
    assert (found["named"], found["right side"], found["right place"]) == (3, 2, 2)
    page = table.markdown([ONE, *others], 0, 60.0)
    assert "Of 6 generated mutants parity kills 66.7 %" in page
    assert "| 00000005 |" in page
    assert "not read yet" in page


@pytest.mark.slow
def test_a_hundred_mutants(tmp_path):
    chosen = campaign.drawn(100, 11)
    outcomes = campaign.run_campaign(chosen, tmp_path, 2, lambda outcome: None, lambda key, seconds: None)
    found = table.summary(outcomes)
    assert found["drawn"] == 100
    assert found["parity"] >= 0.75 * found["judged"], table.sentence(outcomes)
    kept = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["name"] for row in kept} == {m.name for m in chosen}
