"""The command line: exit codes, files, and one clear line for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_common.errors import UserError
from parity.checks.ladder import CHECKS, rows_of, run_checks
from parity.commands import cli
from parity.core.compare import JAX, SHARED, Row
from parity.core.planting import Edit, planted
from parity.report import report
from parity.sides.settings import Settings


def test_one_check_alone_writes_table_json_and_markdown(tmp_path, capsys):
    code = cli.main(
        ["run", "--check", "logits", "--dtype", "float64", "--seed", "7", "--length", "5", "--out", str(tmp_path)]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "All 9 checks hold: JAX, PyTorch and the specification agree." in out
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["ok"]
    assert content["settings"]["seed"] == 7
    assert content["settings"]["cfg"]["hidden_size"] == 32
    assert content["environment"]["versions"]["jax"]
    assert {row["check"] for row in content["rows"]} == {"logits"}
    assert all(row["measured"] <= row["allowed"] == 1e-12 for row in content["rows"])
    assert "| logits | as given | float64 |" in (tmp_path / "report.md").read_text()


def test_a_difference_gives_exit_code_one_and_names_the_side(tmp_path, capsys, monkeypatch, fresh):
    import jax_llm.layers

    monkeypatch.setattr(jax_llm.layers.swiglu, "__code__", (lambda gate, up: gate * up).__code__)
    code = cli.main(["--check", "logits", "--dtype", "float64", "--out", str(tmp_path)])  # bare flags mean `run`
    out = capsys.readouterr().out
    assert code == 1
    assert "First at logits" in out
    assert "Side: JAX." in out
    assert not json.loads((tmp_path / "report.json").read_text())["ok"]


def test_a_side_that_raises_is_a_finding_and_not_the_end(monkeypatch, fresh):
    import torch_llm.layers

    def broken(gate, up):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(torch_llm.layers.swiglu, "__code__", broken.__code__)
    rows = run_checks(Settings(dtypes=("float64",)), ("logits", "init"))
    found = [(row.check, row.ok, row.side) for row in rows]
    assert found[0] == ("logits", False, "torch")
    assert len(found) > 2
    assert set(found[1:]) == {("init", True, "")}
    assert "RuntimeError: shapes differ" in rows[0].note


def test_the_ladder_holds_with_the_attention_that_a_cpu_takes_by_itself():
    settings = Settings(attention="auto", dtypes=("float32", "bfloat16"), tokens=200)
    rows = run_checks(settings, ("logits", "gradients", "cache", "tokens"))
    assert len(rows) > 10
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["run", "--preset", "huge"], "unknown preset 'huge'"),
        (["run", "--check", "logit"], "--check logit: no such check: did you mean logits.; known: spec, config"),
        (["run", "--seed", "-1"], "seed = -1"),
        (["run", "--batch", "0"], "batch = 0"),
        (["run", "--length", "65"], "length needs 65 positions"),
        (["run", "--model-config", "nothing.json"], "nothing.json: no such file"),
        (
            ["run", "--check", "spec", "--dtype", "float32", "--check", "init", "--dtype", "bfloat16", "--seed", "-2"],
            "seed = -2",
        ),
        (["demo", "--steps", "3"], "at least 20 steps"),
        (["mutants", "no such bug"], "no planted bug is called 'no such bug'"),
        (["trace", "--preset", "huge"], "unknown preset 'huge'"),
        (["pair", "nothing.py"], "nothing.py: no such script"),
        (["pair", __file__], "makes no parity.pair.Pair"),
        (["demo", "--data", "nothing"], "nothing: no such file or folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(flags, words, tmp_path):
    with pytest.raises(UserError, match=words):
        cli.main([*flags, "--out", str(tmp_path)])


def test_a_trace_writes_its_points_and_the_page_shows_them(tmp_path, capsys):
    assert cli.main(["trace", "--out", str(tmp_path)]) == 0
    assert "No difference: given identical inputs" in capsys.readouterr().out
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["ok"]
    assert len(content["points"]) == 37
    assert cli.main(["run", "--check", "schedule", "--out", str(tmp_path)]) == 0
    assert "Module by module" in (tmp_path / "report.html").read_text()


def test_a_pair_from_a_script(tmp_path, capsys):
    script = Path(__file__).parents[2] / "examples" / "mlp.py"
    assert cli.main(["pair", str(script), "--dtype", "float64", "--out", str(tmp_path)]) == 0
    assert "MLP: JAX and torch agree" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


def test_mutants_are_listed_without_running(tmp_path, capsys):
    assert cli.main(["mutants", "clip:", "--list", "--out", str(tmp_path)]) == 0
    assert "1e-6 beside the norm" in capsys.readouterr().out


def test_calibrations_are_merged_into_one_table(tmp_path):
    figure = {"check": "logits", "item": "as given", "dtype": "float64", "largest": "1e-15", "allowed": "1e-12"}
    for i, share in enumerate(("0.001", "0.002")):
        rows = [figure | {"share": share, "runs": 3, "alarms": i}]
        (tmp_path / f"{i}.json").write_text(json.dumps({"runs": 3, "figures": rows}))
    merge = ["--merge", str(tmp_path / "0.json"), "--merge", str(tmp_path / "1.json")]
    assert cli.main(["calibrate", "--seeds", "0", *merge, "--out", str(tmp_path)]) == 1, "a false alarm fails"
    table = (tmp_path / "tolerances.md").read_text()
    assert "6 runs of the whole ladder" in table
    assert "**1 false alarms**" in table
    assert "| logits | as given | float64 | 1.0e-15 | 1.0e-12 | 500.0 |" in table


def test_a_check_without_a_part_in_the_dtype_says_so(tmp_path):
    with pytest.raises(UserError, match="nothing was checked"):
        cli.main(["--check", "resume", "--dtype", "float32", "--out", str(tmp_path)])


def test_the_verdict_names_the_first_failure():
    good = Row("logits", "x", "float64", 0.0, 1.0, True)
    bad = Row("gradients", "y", "float64", 2.0, 1.0, False, JAX)
    assert report.verdict_line([good]).startswith("The one check holds")
    assert report.verdict_line([good, bad]) == "1 of 2 checks fail. First at gradients (y): 2, allowed 1. Side: JAX."


def test_brackets_and_pipes_in_a_note_are_printed_as_they_are(tmp_path, capsys):
    rows = [
        Row("a", "max |dp|", "float64", 2.0, 1.0, False, JAX, "shape [3, 4] and [/bold]"),
        Row("b", "x", "", 0.0, 1.0, True),
    ]
    report.print_table(report.make_console(), [*rows, rows[0]])
    assert capsys.readouterr().out.count("shape [3, 4] and [/bold]") == 2
    report.write_markdown(tmp_path / "report.md", rows, [], "cpu")
    assert "| a | max \\|dp\\| | float64 |" in (tmp_path / "report.md").read_text()


def test_every_check_has_a_sentence_about_itself():
    assert all(check.__doc__ for check in CHECKS.values())


@pytest.mark.slow
def test_the_whole_ladder_holds_on_fresh_seeds(tmp_path):
    for seed in (101, 102, 103):
        assert cli.main(["--seed", str(seed), "--tokens", "20000", "--out", str(tmp_path)]) == 0


ONE_WORKER = """
import os, time
from parity.checks.ladder import processes
if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "one_worker.py").write_text(ONE_WORKER)
    command, pipe = [sys.executable, tmp_path / "one_worker.py"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    for _ in range(300):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists() and " Z " in Path(f"/proc/{worker}/stat").read_text():
            return  # ended, and not yet collected by whoever adopted it
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker goes on")


@pytest.mark.parametrize(
    ("edit", "side"),
    [
        (Edit("jax_llm.engine.train:read_batch", "dataset.batch(step)", "dataset.batch(cfg)"), JAX),
        (Edit("llm_common.data.datasets:Prefetch.batch", "...", "raise KeyError(step)"), SHARED),
    ],
    ids=["handed over wrongly", "broken itself"],
)
def test_who_raised_in_shared_code_is_asked_of_the_other_side(edit, side, fresh):
    settings = Settings(steps=1, updates=(1, 3), noise=False, blamed_only=True, dtypes=("float64",))
    with planted([edit]):
        *_, row = rows_of("adamw", settings)
    assert (row.item, row.side) == ("raised an error", side)
    assert "read_batch in train.py" in row.place
