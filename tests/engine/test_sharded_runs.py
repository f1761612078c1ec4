"""Whole runs on many devices through `scripts/train.py`: they change mesh and framework, lose a process, and refuse
what cannot be.
"""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_common.config import ModelConfig
from llm_common.data.datasets import write_described
from llm_common.data.sequences import DocumentEncoder
from llm_common.run.checkpoint import checkpoints, load_checkpoint
from llm_common.run.log import read_log
from llm_common.text.tokenizer import Tokenizer
from parity.sharded.sharded import Group, environment, free_port

ROOT = Path(__file__).parents[2]
CFG = ModelConfig(256, 32, 64, 2, 8, 4, head_dim=8, max_position_embeddings=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("runs")
    (path / "config.json").write_text(json.dumps(CFG.to_hf()))
    Tokenizer([], special_tokens=[]).save(path / "bpe.json")
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
    content = io.BytesIO()
    np.save(content, tokens)
    write_described(
        path / "tokens.npy", content.getvalue(), DocumentEncoder(Tokenizer.load(path / "bpe.json"), "none").describe()
    )
    return path


def start(
    folder: Path, framework: str, out: str, mesh: str | None, devices: int, *flags: object
) -> list[subprocess.Popen]:
    """The processes of a run; in JAX one process has all devices."""
    count = devices if framework == "torch" else 1
    command = [sys.executable, ROOT / "scripts" / "train.py", "--framework", framework, "--out", folder / out]
    command += ["--model-config", folder / "config.json", "--data", folder / "tokens.npy"]
    command += ["--tokenizer", folder / "bpe.json", "--device", "cpu", "--compute-dtype", "float64"]
    command += ["--batch-size", 8, "--seq-len", 16, "--total-steps", 12, "--join-timeout", 60]
    command += ["--mesh", mesh] if mesh else []
    group = Group(framework, count, devices if framework == "jax" else 1, ())
    port = free_port()
    environments = [environment(group, i, port, "cpu") if mesh else os.environ for i in range(count)]
    words = [str(x) for x in (*command, *flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(words, env=dict(env), **pipes) for env in environments]


def finish(processes: list[subprocess.Popen]) -> str:
    output = "".join(process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0] * len(processes), output
    return output


def stop_after(folder: Path, out: str, step: int, processes: list[subprocess.Popen]) -> None:
    """Ask for an end, as Ctrl-C does, once a step is saved."""
    deadline = time.monotonic() + 240
    while not any(int(x.name[5:]) >= step for x in checkpoints(folder / out)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes[:1]:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    finish(processes)


@pytest.mark.slow
def test_a_run_that_changes_mesh_and_framework_ends_where_the_straight_one_does(folder):
    finish(start(folder, "torch", "straight", None, 1))
    every = ("--save-every", 1, "--keep-last", 0)
    stop_after(folder, "changed", 2, start(folder, "torch", "changed", "fsdp=2,tensor=2", 4, *every))
    stop_after(folder, "changed", 6, start(folder, "jax", "changed", "data=2,tensor=2", 4, *every))
    finish(start(folder, "torch", "changed", "data=2,fsdp=2", 4, *every))
    straight, changed = (load_checkpoint(checkpoints(folder / name)[-1])[1] for name in ("straight", "changed"))
    assert (changed.step, changed.adam_count) == (12, 12)
    for part in ("weights", "mu", "nu"):
        for name, x in getattr(straight, part).items():
            np.testing.assert_allclose(getattr(changed, part)[name], x, rtol=0, atol=1e-11, err_msg=f"{part} {name}")


@pytest.mark.slow
def test_a_process_killed_while_saving_loses_nothing(folder):
    rng, killed = random.Random(0), 0
    for attempt in range(6):
        out = f"killed-{attempt}"
        processes = start(folder, "torch", out, "fsdp=2", 2, "--save-every", 1, "--keep-last", 0, "--total-steps", 2000)
        while not checkpoints(folder / out):
            time.sleep(0.02)
        time.sleep(rng.random())
        processes[attempt % 2].kill()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()  # it waits for the other, as it must, until the group's own time is up
            process.communicate()
        found = checkpoints(folder / out)
        state = load_checkpoint(found[-1])[1]  # the sha256 of every file
        assert all(np.isfinite(x).all() for x in state.weights.values())
        killed += len([x for x in (folder / out).iterdir() if x.name.endswith(".partial")])
        last = state.step
        stop_after(folder, out, last + 1, start(folder, "jax", out, None, 1, "--save-every", 1, "--total-steps", 2000))
    assert killed > 0, "no save was cut off: the test has not tested what it is for"


def test_what_a_mesh_is_refused_for(folder):
    def refused(*args, **variables):
        (process, *_) = start(folder, *args)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        return output

    text = refused("jax", "bad", "fsdp=4", 2)
    assert "takes 4 cpu devices, present: 2" in text
    assert "tensor = 8 does not divide num_key_value_heads = 4" in refused("jax", "bad", "tensor=8", 8)
    assert not (folder / "bad").exists()


def test_processes_end_well_right_after_their_last_collective():
    """Without the pause at the end some abort, so that a run of this in two or three goes red: the long switch interval
    keeps gloo's threads from the interpreter's lock.
    """
    code = """
import sys
import torch, torch.distributed as dist
from torch_llm.engine.hosts import join_hosts
torch.set_num_threads(1)
hosts = join_hosts("cpu", 60)
sys.setswitchinterval(100)
for _ in range(20):
    dist.all_gather([torch.ones(1000) for _ in range(4)], torch.ones(1000))
hosts.gather(None)
"""
    shared = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**shared, "RANK": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors


def test_hosts_that_begin_their_own_processes(folder):
    """Two hosts of two devices each, which are one machine: the losses of one process; one mistake is one line on each
    host.
    """
    words = [sys.executable, str(ROOT / "scripts" / "train.py"), "--framework", "torch", "--device", "cpu"]
    words += ["--compute-dtype", "float64", "--batch-size", "8", "--seq-len", "16", "--total-steps", "3"]
    words += ["--model-config", str(folder / "config.json"), "--data", str(folder / "tokens.npy")]
    words += ["--tokenizer", str(folder / "bpe.json"), "--join-timeout", "60"]
    one = subprocess.run([*words, "--out", str(folder / "alone")], capture_output=True, text=True, check=False)
    assert one.returncode == 0, one.stderr
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def on_host(number: int, mesh: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "NNODES": "2", "NODE_RANK": str(number), **address, **variables}
        flags = [*words, "--out", str(folder / "two hosts"), "--mesh", mesh]
        return subprocess.Popen(flags, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    outputs = [process.communicate(timeout=300) for process in [on_host(i, "data=2,fsdp=2") for i in range(2)]]
    assert [(out != "", error) for out, error in outputs] == [(True, ""), (False, "")], outputs
    losses = [
        [entry["loss"] for entry in read_log(folder / name / "log.jsonl") if "loss" in entry]
        for name in ("alone", "two hosts")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-12)
    for mesh, variables, word in (
        ("data=4", {"NNODES": "3"}, "error: a mesh of 4 devices cannot be shared by NNODES=3 hosts"),
        ("data=2", {"NODE_RANK": "2"}, "error: NODE_RANK=2: hosts are counted from 0, and NNODES is 2"),
        ("data=2", {"NNODES": "two"}, "error: NNODES=two: must be a whole number of at least 1"),
    ):
        out, error = on_host(1, mesh, **variables).communicate(timeout=60)
        assert (out, error.count("\n"), error[: len(word)]) == ("", 1, word)


def _runs(process: int) -> bool:
    """Whether a process is there, and not only its entry that nobody has collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_process_outlives_the_one_that_began_it(tmp_path):
    """A killed parent cannot tell its children; they notice. A process of which the variable came without the pipe goes
    on.
    """
    child = (
        "import time; from llm_common.processes import end_with_launcher; end_with_launcher(); print('up\\n', "
        "end='', flush=True); time.sleep(60)"
    )
    parent = f"""
import os, subprocess, sys
from llm_common.processes import lifeline
with lifeline() as (descriptor, variables):
    for passed in ([descriptor], []):
        child = subprocess.Popen([sys.executable, "-c", {child!r}], pass_fds=passed, env={{**os.environ, **variables}})
        print(child.pid, flush=True)
    child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(4)]
        process.kill()
    watched, other = (int(x) for x in lines if x != "up")
    try:
        deadline = time.monotonic() + 30
        while _runs(watched) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(watched)
        assert _runs(other)
    finally:
        os.kill(other, signal.SIGKILL)
