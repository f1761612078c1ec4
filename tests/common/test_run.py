"""A run in its folder: one at a time, stopped and killed at any moment, on a full disk; nothing that was saved
is lost.
"""

import collections
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llm_common.config import OptimizerConfig, Recipe, RunConfig, TrainConfig, preset
from llm_common.data.evaluation import Evaluation
from llm_common.errors import UserError, sha256_of, with_checksum
from llm_common.run.checkpoint import (
    TrainingState,
    checkpoints,
    held_out_loss,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from llm_common.run.folder import Run
from llm_common.run.log import RunLog, read_log
from llm_common.run.progress import Heartbeat, reading_bar
from llm_common.tensors import tensor_shapes

CFG, ROOT = preset("tiny"), Path(__file__).parents[2]
OPT = OptimizerConfig(total_steps=10)


def make_state(step: int) -> TrainingState:
    tensors = lambda: {name: np.full(shape, step, np.float32) for name, shape in tensor_shapes(CFG).items()}
    return TrainingState(tensors(), tensors(), tensors(), step, step)


class Data:
    def batch(self, step, host=0, n_hosts=1):
        raise NotImplementedError

    def fingerprint(self):
        return {"tokens": 1}


def make_run(folder, opt=OPT, losses=(), **more) -> tuple[Run, list]:
    """A run, and the rows that it tells."""
    rows: list[dict] = []
    evaluation = Evaluation(np.arange(9), 4, 2) if losses else None
    return Run(
        folder,
        Recipe(CFG, TrainConfig(seq_len=8), opt),
        Data(),
        "jax",
        evaluation=evaluation,
        on_event=rows.append,
        **more,
    ), rows


def drive(run: Run, until: int = 10, losses=(), at=None) -> Path:
    """What `fit_and_save` does, without a framework: step n has loss 1 / n. at: called after each step."""
    with run:
        state = run.resume()
        step, held_out = 0 if state is None else state.step, list(losses)
        snapshot, evaluate = lambda: make_state(step), lambda evaluation: (held_out.pop(0) * 8, 8)
        while step < until:
            step += 1
            if at is not None:
                at(step)
            metrics = {"loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "skipped": False}
            if run.after_step(step, metrics, snapshot, evaluate):
                break
        return run.finish(step, snapshot, evaluate)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_log(folder / "log.jsonl") if "event" not in row]


def test_the_last_and_the_best_are_kept(tmp_path):
    losses = [3.0, 1.0, 2.0, 2.5, 2.4]
    run, rows = make_run(tmp_path, losses=losses, config=RunConfig(save_every=2, keep_last=2, keep_best=1))
    drive(run, losses=losses)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004", "step-00000008", "step-00000010"]
    assert held_out_loss(tmp_path / "step-00000004") == 1.0
    assert [row["step"] for row in rows if row.get("event") == "evaluation"] == [2, 4, 6, 8, 10]
    assert names(tmp_path) == [".lock", "log.jsonl", "step-00000004", "step-00000008", "step-00000010"]


def test_evaluations_and_saves_have_their_own_rhythm(tmp_path):
    losses = [float(x) for x in range(9)]
    run, rows = make_run(tmp_path, losses=losses, config=RunConfig(save_every=6, eval_every=4, keep_last=0))
    drive(run, losses=losses)
    assert [(row["event"], row["step"]) for row in rows if "event" in row] == [
        ("evaluation", 4),
        ("evaluation", 6),
        ("save", 6),
        ("evaluation", 8),
        ("evaluation", 10),
        ("save", 10),
        ("end", 10),
    ]


class Slow(collections.UserDict):
    """Metrics of a step that is under way: who reads them waits for 2 seconds."""

    def __init__(self, clock, values):
        super().__init__(values)
        self.clock = clock

    def keys(self):
        self.clock[0] += 2.0
        return super().keys()


def test_the_speed_is_that_of_the_steps_alone(tmp_path, monkeypatch):
    """Evaluations and saves of 100 seconds are no part of a step's time, nor do they hide one's."""
    clock = [0.0]
    monkeypatch.setattr("llm_common.run.folder.time.monotonic", lambda: clock[0])
    run, rows = make_run(tmp_path, losses=[1.0], config=RunConfig(eval_every=3, save_every=4))

    def slow(_):
        clock[0] += 100.0
        return 8.0, 8

    with run:
        run.resume()
        for step in range(1, 11):
            metrics = Slow(clock, {"loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "skipped": False})
            run.after_step(step, metrics, lambda: make_state(step), slow)  # noqa: B023  # called at once
        run.finish(10, lambda: make_state(10), slow)
    tokens = TrainConfig().batch_size * 8
    assert [row["tokens_per_second"] for row in rows if "event" not in row] == [tokens / 2] * 10


def test_saving_by_the_clock(tmp_path):
    run, _ = make_run(tmp_path, config=RunConfig(save_minutes=1e-9, keep_last=0))
    drive(run, until=3)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n:08}" for n in (1, 2, 3)]


def test_keep_last_0_keeps_all(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, CFG, make_state(step), {})
    assert prune_checkpoints(tmp_path, 0, 0) == []
    assert prune_checkpoints(tmp_path, 1, 0) == [tmp_path / "step-00000001", tmp_path / "step-00000002"]


def test_the_log_holds_every_step_once(tmp_path):
    run, _ = make_run(tmp_path, config=RunConfig(save_every=3))

    class Killed(BaseException):
        pass

    def kill(step):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        drive(run, at=kill)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line that was being written
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    drive(make_run(tmp_path)[0])
    assert steps(tmp_path) == list(range(1, 11))
    starts = [row["step"] for row in read_log(tmp_path / "log.jsonl") if row.get("event") == "start"]
    assert starts == [0, 3]
    drive(make_run(tmp_path)[0])  # nothing left to do
    assert steps(tmp_path) == list(range(1, 11))


def test_a_run_without_a_checkpoint_begins_its_log_again(tmp_path):
    with RunLog(tmp_path / "log.jsonl") as log:
        log.write({"step": 1, "loss": 1.0})
    drive(make_run(tmp_path)[0], until=2)
    assert steps(tmp_path) == [1, 2]


def test_two_runs_in_one_folder(tmp_path):
    first, second = make_run(tmp_path)[0], make_run(tmp_path)[0]
    with first, pytest.raises(UserError, match=rf"process {os.getpid()} on .* is training in this folder"), second:
        pass
    drive(second, until=1)  # the lock went with the first


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match=r"x: no folder can be made there \(a file of this name is there\)"):
        drive(make_run(tmp_path / "x")[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_after_the_step(number, tmp_path):
    run, rows = make_run(tmp_path)
    before = signal.getsignal(number)
    folder = drive(run, at=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert folder.name == "step-00000004"
    assert rows[-1]["event"] == "stop"
    assert signal.getsignal(number) is before
    drive(make_run(tmp_path)[0])
    assert steps(tmp_path) == list(range(1, 11))


def child(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'common'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_signal_ends_at_once(tmp_path):
    process = child(
        """
        import sys, time
        from test_run import *
        def slow(step):
            print("ready", flush=True)
            time.sleep(60)
        drive(make_run(Path(sys.argv[1]))[0], at=slow)
        """,
        tmp_path,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None  # the first waits for the step
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    process.communicate()
    drive(make_run(tmp_path)[0], until=1)  # the lock was freed


SAVE_AGAIN_AND_AGAIN = """
import sys
from test_run import *
run, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    save_checkpoint(run, CFG, make_state(step), {})
    if step % 2:
        save_checkpoint(run, CFG, make_state(step), {"again": True})  # the same step once more
    prune_checkpoints(run, 2, 0)
"""


def test_a_save_killed_before_the_old_folder_was_deleted_leaves_nothing_after_pruning(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(3), {})
    shutil.copytree(folder, tmp_path / f".{folder.name}.old")
    assert prune_checkpoints(tmp_path, 2, 0) == []
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    folder.rename(tmp_path / f".{folder.name}.old")  # killed one step earlier: the old one is all there is
    assert prune_checkpoints(tmp_path, 2, 0) == []
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_saving(kills, tmp_path):
    """At random moments of saving and deleting: the newest checkpoint is complete, and never an older one than
    before.
    """
    save_checkpoint(tmp_path, CFG, make_state(1), {})
    rng, last, leftovers = random.Random(0), 1, 0
    for _ in range(kills):
        process = child(SAVE_AGAIN_AND_AGAIN, tmp_path, last)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        process.communicate()
        leftovers += any(path.name.startswith(".step") for path in tmp_path.iterdir())
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        _, state, _ = load_checkpoint(newest, CFG)
        assert state.step >= last
        for tensors in (state.weights, state.mu, state.nu):
            assert all((x == state.step).all() for x in tensors.values())
        last = state.step
    assert leftovers > kills / 4  # most kills did hit a save
    prune_checkpoints(tmp_path, 2, 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".step")]


@pytest.mark.parametrize("limit", [1_000, 60_000, 1_000_000])
def test_a_full_disk_is_one_error_and_loses_nothing(limit, tmp_path):
    """A limit on the size of a file stands for the disk: the write fails in the middle, as it does there."""
    before = save_checkpoint(tmp_path, CFG, make_state(1), {})
    process = child(
        """
        import resource, sys
        from test_run import *
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        try:
            save_checkpoint(Path(sys.argv[1]), CFG, make_state(2), {})
        except UserError as error:
            print(error)
        """,
        tmp_path,
        limit,
    )
    out, err = process.communicate()
    if limit == 1_000_000:  # room enough for each file of this model
        assert (out, err) == ("", "")
        return
    assert err == ""
    assert "step-00000002: cannot be written" in out
    assert f"{before} is complete" in out
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(before)[1].step == 1


def test_a_full_disk_under_the_log(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"step": 1})
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"log.jsonl: cannot be written \(No space left on device\)"):
        log.write({"step": 2, "text": "x" * 100_000})
    log.close()


def test_a_state_file_that_lies_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {})
    good = json.loads((folder / "state.json").read_text())
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    entry = {"size": 1, "sha256": sha256_of(outside)}
    lies = [
        ({**good, "step": -1}, "damaged"),
        ({**good, "step": "1"}, "damaged"),
        ({**good, "files": []}, "damaged"),
        ({**good, "settings": None}, "damaged"),
        (
            {**good, "files": {k: v for k, v in good["files"].items() if k != "model.safetensors"}},
            "does not list model",
        ),
        ({**good, "files": {**good["files"], "../outside": entry}}, "'../outside' is not the entry of a file"),
        ({**good, "files": {**good["files"], "config.json": 3}}, "'config.json' is not the entry"),
    ]
    for content, words in lies:
        (folder / "state.json").write_text(json.dumps(with_checksum(content)))
        with pytest.raises(UserError, match=words):
            load_checkpoint(folder)
    (folder / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        load_checkpoint(folder)
    (folder / "state.json").write_text(json.dumps(good))
    (folder / "optimizer.safetensors").rename(tmp_path / "o")
    (folder / "optimizer.safetensors").symlink_to(tmp_path / "o")
    with pytest.raises(UserError, match=r"optimizer.safetensors: a link"):
        load_checkpoint(folder)


def test_a_stop_saves_before_anything_else(tmp_path):
    """No held-out loss is computed once somebody waits for the end; what is not known is never a best one, and
    stays.
    """
    losses = [3.0, 2.0]
    run, rows = make_run(tmp_path, losses=losses, config=RunConfig(save_every=2, keep_last=1, keep_best=1))
    drive(run, losses=losses, at=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    assert [row["event"] for row in rows if "event" in row] == [
        "evaluation",
        "save",
        "evaluation",
        "save",
        "save",
        "stop",
    ]
    assert steps_of(tmp_path) == [4, 5]
    assert [held_out_loss(folder) for folder in checkpoints(tmp_path)] == [2.0, None]
    more = [5.0, 1.5, 4.0]
    run, _ = make_run(tmp_path, losses=more, config=RunConfig(save_every=2, keep_last=1, keep_best=1))
    drive(run, losses=more)
    assert steps_of(tmp_path) == [8, 10]  # the best one and the newest


def steps_of(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(folder)]


def test_a_stop_ends_an_evaluation_that_is_under_way(tmp_path):
    """Thirty seconds are all that a preemption gives: held-out batches that are left are left."""
    run, rows = make_run(tmp_path, losses=[1.0], config=RunConfig(eval_every=3))
    seen = []

    def evaluate(evaluation):
        for i, _ in enumerate(evaluation.batches()):
            seen.append(i)
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("every batch was evaluated")

    evaluation = Evaluation(np.arange(400), 4, 2)
    run.evaluation = evaluation
    with run:
        run.resume()
        for step in range(1, 10):
            metrics = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "skipped": False}
            if run.after_step(step, metrics, lambda: make_state(3), evaluate):
                break
        run.finish(step, lambda: make_state(3), evaluate)
    assert (step, seen) == (3, [0])
    assert [row["event"] for row in rows if "event" in row] == ["save", "stop"]


def test_a_stop_is_said_at_once(tmp_path, capfd):
    drive(make_run(tmp_path)[0], at=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None)
    assert "stopping after step 4, which is saved first; a second signal ends at once" in capfd.readouterr().err


def test_a_held_out_loss_that_is_no_number_is_not_known(tmp_path, capsys):
    def evaluate(evaluation):
        raise UserError("the loss is not finite: the output of norm is the first tensor that is not finite")

    run, _ = make_run(tmp_path, losses=[1.0])
    with run:
        run.resume()
        run.after_step(1, {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "skipped": False}, lambda: make_state(1), evaluate)
        folder = run.finish(1, lambda: make_state(1), evaluate)
    assert held_out_loss(folder) is None
    assert "step 1: no held-out loss (the loss is not finite: the output of norm" in capsys.readouterr().err


def test_a_run_is_extended(tmp_path):
    """More steps in all: the state stays, the segments are recorded, and it is said in a line."""
    drive(make_run(tmp_path)[0])
    run, rows = make_run(tmp_path, opt=OptimizerConfig(total_steps=14))
    folder = drive(run, until=14)
    assert rows[1] == {"event": "extend", "step": 10, "from": 10, "total_steps": 14}
    segments = [{"from_step": 0, "total_steps": 10}, {"from_step": 10, "total_steps": 14}]
    assert json.loads((folder / "state.json").read_text())["settings"]["segments"] == segments
    assert steps(tmp_path) == list(range(1, 15))
    run, rows = make_run(tmp_path, opt=OptimizerConfig(total_steps=14))
    drive(run, until=14)  # nothing left to do
    assert [row["event"] for row in rows] == ["resume", "end"]
    with pytest.raises(UserError, match="may become longer, not shorter"):
        drive(make_run(tmp_path)[0])
    run, _ = make_run(tmp_path, opt=OptimizerConfig(total_steps=20))
    folder = drive(run, until=16)  # ended before its end, and extended again
    run, _ = make_run(tmp_path, opt=OptimizerConfig(total_steps=30))
    folder = drive(run, until=17)
    found = json.loads((folder / "state.json").read_text())["settings"]["segments"]
    assert [(x["from_step"], x["total_steps"]) for x in found] == [(0, 10), (10, 14), (14, 20), (16, 30)]


def test_a_folder_deleted_meanwhile_is_made_again(tmp_path, capsys):
    folder = tmp_path / "run"

    def at(step):
        if step == 5:
            shutil.rmtree(folder)

    drive(make_run(folder, config=RunConfig(save_every=3))[0], at=at)
    assert latest_checkpoint(folder).name == "step-00000010"
    load_checkpoint(latest_checkpoint(folder))
    assert "was deleted while this run trained: it is made again" in capsys.readouterr().err
    assert steps(folder)[-1] == 10


def test_a_folder_replaced_meanwhile_is_not_written_into(tmp_path, capsys):
    folder = tmp_path / "run"

    def at(step):
        if step == 5:
            folder.rename(tmp_path / "moved")
            folder.mkdir()
            (folder / "thesis.tex").write_text("mine")

    drive(make_run(folder, config=RunConfig(save_every=3))[0], at=at)
    assert names(folder) == ["thesis.tex"]
    assert latest_checkpoint(tmp_path / "run-rescued-1").name == "step-00000010"
    assert latest_checkpoint(tmp_path / "moved").name == "step-00000003"
    assert "was replaced by another folder while this run trained: it goes on in" in capsys.readouterr().err


def lines_until(said: Callable[[], str], wanted: str) -> str:
    """What was said once `wanted` is in it; a slow machine may take its time."""
    found, end = "", time.monotonic() + 60
    while wanted not in found and time.monotonic() < end:
        time.sleep(0.05)
        found += said()
    return found


def test_a_program_that_says_nothing_says_what_it_does(capsys):
    said = lambda: capsys.readouterr().err
    with Heartbeat("reading", every=0.1) as heart:
        assert "reading (0:0" in lines_until(said, "reading")
        heart.says("writing")
        assert "writing (0:0" in lines_until(said, "writing")
    said()
    time.sleep(0.3)
    assert not said()  # it has ended


def test_reading_into_a_pipe_is_shown_too(capsys, monkeypatch):
    monkeypatch.setenv("ONE_MODEL_HEARTBEAT", "0.1")
    with reading_bar(Console(file=io.StringIO())) as show:
        show("encoding", 1, 4)
        assert "encoding: 25 % (0:0" in lines_until(lambda: capsys.readouterr().err, "encoding")
