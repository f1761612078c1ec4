"""The benchmark's programs: what they refuse, what they measure."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_common.config import Recipe, TrainConfig, preset
from llm_common.errors import UserError
from llm_tools import flags
from llm_tools.bench import measure, report

SCRIPTS = Path(__file__).parents[2] / "scripts"


def benchmark(*flags: str) -> None:
    """In a process of its own, which starts more of them."""
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "--peer", "nobody"], "--peer nobody: unknown; known: transformers"),
        (["train", "--peer", "missing.py"], "no such file"),
        (["decode", "--preset", "tiny", "--new-tokens", "64"], "needs 192 positions but max_position_embeddings = 64"),
        (["train", "--preset", "tiny", "--seq-len", "65"], "needs 65 positions"),
        (["train", "--preset", "huge"], "unknown preset 'huge'"),
        (["train", "--groups", "0"], "--groups 0: at least 1"),
        (["tokenizer", "--groups", "0"], "--groups 0: at least 1"),
        (["train", "--batch", "32"], "train takes --batch-size, not --batch"),
        (["decode", "--batch-size", "4"], "decode takes --batch, the number of texts"),
        (["decode", "--preset", "tiny", "--prompt-length", "4", "--new-tokens", "1"], "--new-tokens of at least 2"),
        (["startup", "--peer", "transformers"], "startup takes no --peer"),
        (["attention", "--profile", "runs/x"], "attention takes no --profile"),
        (["train", "--framework", "none"], "nothing to measure"),
        (["train", "--preset", "tiny", "--seq-len", "9", "--document-separator", "5000"], "the vocabulary has 96 ids"),
        (["train", "--peer", "transformers", "--compute-dtype", "float64"], "not in float64"),
        (["decode", "--peer", "transformers", "--temperature", "0.8"], "peers decode greedily"),
        (["decode", "--peer", str(SCRIPTS.parent / "examples/peer_torchtitan.py")], "has no function 'decode'"),
        (["train", "--out", "."], "is a folder"),
        (["train", "--out", __file__ + "/speed"], "--out"),
        (["train", "--loss-chunks", "3", "--seq-len", "128"], "--loss-chunks 3: must divide seq_len = 128"),
    ],
)
def test_benchmark_refuses_before_it_measures(run, flags, message):
    code, _, err = run("benchmark", *flags, "--device", "cpu")
    assert code == 2
    assert message in err


def test_benchmark_names_what_is_wrong_with_a_peer(run, tmp_path):
    for text, message in (
        ("import not_there", "cannot be imported: ModuleNotFoundError"),
        ("def train(", "cannot be imported: SyntaxError"),
        ("train = 1\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int", "would be called 'torch'"),
    ):
        folder = tmp_path / message[-8:]
        folder.mkdir()
        peer = folder / "torch.py"
        peer.write_text("from __future__ import annotations\n" + text)
        code, _, err = run("benchmark", "train", "--peer", peer, "--device", "cpu")
        assert (code, message in err) == (2, True), err


def test_a_worker_may_print_and_may_die(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    lines = ["{'loss': 1.0}", '{"loss": 1}', '{"seconds": 2}']
    script.write_text("\n".join(f"print({line!r})" for line in lines))
    assert measure.run_worker({"what": "train"}) == {"seconds": 2}
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert measure.run_worker({"what": "train"})["error"] == "killed by signal 9"
    assert measure.versions("importlib") == {"importlib": "of unknown version"}


@pytest.mark.slow
def test_benchmark_measures_both_frameworks_and_a_peer(tmp_path):
    peer = tmp_path / "mine.py"
    peer.write_text("import time\ndef train(*args):\n    return lambda inputs, targets: time.sleep(0.01) or 1.0\n")
    common = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--seq-len",
        "32",
        "--groups",
        "2",
        "--steps",
        "2",
        "--warm-up",
        "2",
    ]
    out = ["--out", str(tmp_path / "speed")]
    benchmark("train", *common, "--peer", str(peer), *out, "--profile", str(tmp_path / "trace"))
    cases = {case["side"]: case for case in json.loads((tmp_path / "speed.json").read_text())["cases"]}
    assert cases["jax"]["losses"] == pytest.approx(cases["torch"]["losses"], rel=1e-4)
    assert 0.009 < cases[str(peer)]["seconds"][1] < 1
    assert (tmp_path / "speed.png").stat().st_size > 1000
    for what in ("decode", "attention", "input"):
        more = ["--batch", "2", "--prompt-length", "5", "--new-tokens", "20"] if what == "decode" else []
        benchmark(what, *common, *more, "--framework", "torch")


def test_torchs_search_for_kernels_takes_the_median_of_runs_without_a_cache():
    code = """
from llm_tools import flags
flags.prepare_environment(None)
from torch._inductor.runtime.benchmarking import TritonBenchmarker, benchmarker
assert type(benchmarker) is TritonBenchmarker, type(benchmarker)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("device", "seq_len", "kept"), [("cpu", 128, True), ("gpu", 128, False), ("cpu", 512, False), ("auto", 512, False)]
)
def test_freed_memory_is_kept_for_small_steps_on_a_cpu_alone(device, seq_len, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(flags, "keep_freed_memory", lambda: calls.append(True))
    flags.keep_memory_of_a_small_step(device, Recipe(preset("demo"), TrainConfig(seq_len=seq_len)))
    assert bool(calls) == kept


def test_decoding_asks_for_no_training_length():
    """The default `seq_len` is longer than the positions of a small model, which trains at another length."""
    settings = Recipe(preset("demo")).settings() | {"compute_dtype": None}
    args = SimpleNamespace(
        what="decode", framework="both", peer=[], preset="tiny", model_config=None, device="cpu", profile=None,
        prompt_length=4, new_tokens=4, temperature=0.0, batch=[1], groups=1, steps=1, warm_up=1, **settings,
    )  # fmt: skip
    report.check(args)
    args.what = "train"
    with pytest.raises(UserError, match="seq_len needs 128 positions"):
        report.check(args)
