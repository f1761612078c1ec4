"""Held-out windows, the cost of a step, and what is printed of a run."""

import io
import math
import platform
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from llm_common.config import Recipe, TrainConfig, preset
from llm_common.data.answers import write_examples
from llm_common.data.evaluation import DocumentEvaluation, Evaluation, ExampleEvaluation, Stopped
from llm_common.errors import UserError, is_out_of_memory
from llm_common.run.estimates import flops_per_step, memory_per_step, peak_flops
from llm_common.run.progress import TrainingProgress, duration
from llm_common.text.tokenizer import Tokenizer


@pytest.mark.parametrize(("n", "seq_len", "batch"), [(2, 4, 2), (9, 4, 2), (10, 4, 2), (50, 7, 3), (22, 7, 3)])
def test_every_token_is_a_target_once(n, seq_len, batch):
    tokens = np.arange(100, 100 + n)
    evaluation = Evaluation(tokens, seq_len, batch)
    seen = []
    for inputs, targets in evaluation.batches():
        assert inputs.shape == targets.shape == (batch, seq_len)
        counted = targets != -100
        np.testing.assert_array_equal(inputs[counted] + 1, targets[counted])
        seen += targets[counted].tolist()
    assert seen == tokens[1:].tolist()
    assert evaluation.n_targets == n - 1


def test_bits_per_byte():
    lengths = np.array([0, 1, 2, 3])
    evaluation = Evaluation(np.array([1, 2, 3, 0, 1]), 2, 1, lengths)
    result = evaluation.summary(8 * math.log(2), 4)
    assert result == {
        "loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4.0),
        "tokens": 4,
        "bytes": 6,
        "bits_per_byte": pytest.approx(8 / 6),
    }
    part = Evaluation(np.array([1, 2, 3, 0, 1]), 2, 1, lengths, max_batches=1)
    assert sum(1 for _ in part.batches()) == 1
    assert part.summary(1.0, 2)["bytes"] == 5
    with pytest.raises(UserError, match="1 held-out tokens: at least 2"):
        Evaluation(np.array([1]), 2, 1)
    with pytest.raises(UserError, match="token id 3 is outside"):
        evaluation.check(3, "text")


def test_flops_of_a_known_shape():
    """1b at T 2048: 6 x matmul parameters, and attention 6 x L x N x H x (T + 1) for each token."""
    cfg, train = preset("1b"), TrainConfig(batch_size=16, seq_len=2048)
    matmul = cfg.num_parameters() - cfg.vocab_size * cfg.hidden_size - (2 * 16 + 1) * 2048  # less embedding and norms
    expected = 6 * (matmul + 16 * 32 * 64 * 2049) * 16 * 2048
    assert flops_per_step(cfg, train) == pytest.approx(expected, rel=1e-12)


def test_memory_falls_with_what_saves_it():
    cfg = preset("124m")
    need = lambda fused=True, **settings: sum(
        memory_per_step(
            Recipe.from_settings(cfg, {"batch_size": 16, "seq_len": 2048, **settings}), fused, True
        ).values()
    )
    plain = need()
    assert need(remat="full") < plain < need(fused=False)
    # what "dots" spares a fused layer is little; of the reference attention it spares the scores
    assert need(False, remat="full") < need(False, remat="dots") < need(False) / 2
    assert need(gradient_accumulation_steps=4) < plain / 2
    assert need(compute_dtype="bfloat16") < plain < need(compute_dtype="float64")
    weights = memory_per_step(Recipe(cfg), True, True)
    assert (weights["weights"], weights["moments"]) == (4 * cfg.num_parameters(), 8 * cfg.num_parameters())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_freed_memory_is_kept_for_the_next_step():
    code = """
import resource, sys, threading, numpy as np
from llm_common.run.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def steps():
    for step in range(5):
        np.ones(2**25)  # 256 MiB, 65,536 pages
        new.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
new = []
thread = threading.Thread(target=steps)  # where JAX computes, too
thread.start()
thread.join()
print((new[-1] - new[0]) // 4)
"""
    run = lambda how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True).stdout)
    assert 10 * run("keep") < run("no")


def test_peaks_are_known_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None


def test_out_of_memory_is_recognised():
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (
        MemoryError(),
        OutOfMemoryError("x"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("memory"))


def test_what_a_person_sees():
    console = Console(file=io.StringIO(), width=200, highlight=False)
    progress = TrainingProgress(console, 4, 2, 1000, 1e9, 1e14, lambda: 3 * 2**30)
    row = {"loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "skipped": False, "tokens_per_second": 20_000.0}
    with progress:
        for step in (1, 2, 3, 4):
            progress({"step": step, **row, "skipped": step == 4})
        progress({"event": "evaluation", "step": 4, "loss": 1.5, "perplexity": 4.5, "bits_per_byte": 0.7, "tokens": 9})
    progress.summary("runs/x", "runs/x/log.jsonl")
    out = console.file.getvalue()
    assert (
        "step 2/4  loss 2.0000  norm 1.000  lr 1.00e-03  20,000 tokens/s  left 0:00  memory 3.00 GiB  MFU 20.0 %" in out
    )
    assert "update skipped: the gradient norm is not finite" in out
    assert "held-out loss 1.5000  perplexity 4.50  0.7000 bits per byte" in out
    assert "4 now, 1 of them without an update" in out
    assert "20,000 tokens/s (median)" in out
    assert duration(3723) == "1:02:03"


def rolling_windows(ids, prefix, length):
    """lm-eval's rule (0.4.13), written down again: (inputs, predicted) of a document, with a context of one token."""
    first = min(length, len(ids))
    out = [([prefix, *ids[: first - 1]], ids[:first])]
    done = first
    while done < len(ids):
        n = min(len(ids) - done, length)
        end = done + n
        out.append((ids[max(0, end - length - 1) : end - 1], ids[end - n : end]))
        done = end
    return out


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 30])
def test_documents_have_the_windows_of_lm_eval(length):
    documents = [[5], list(range(10, 17)), [], list(range(20, 43)), [7, 8]]
    evaluation = DocumentEvaluation(documents, [1], length, 3, 99)
    found = []
    for inputs, targets in evaluation.batches():
        assert inputs.shape == targets.shape == (3, evaluation.seq_len)
        for row, target in zip(inputs, targets, strict=True):
            at = np.flatnonzero(target != -100)
            if len(at):
                assert (at == np.arange(at[0], at[-1] + 1)).all()
                found.append((row[: at[-1] + 1].tolist(), target[at].tolist()))
    assert found == [window for ids in documents if ids for window in rolling_windows(ids, 1, length)]
    assert evaluation.n_targets == sum(map(len, documents))
    assert evaluation.summary(6.0, 3)["bits_per_byte"] == pytest.approx(6 / math.log(2) / 99)


def test_documents_without_anything_before_them():
    evaluation = DocumentEvaluation([[5], [1, 2, 3, 4, 5]], [], 2, 4, 9)
    ((inputs, targets),) = evaluation.batches()
    assert inputs[:2].tolist() == [[1, 2], [3, 4]]
    assert targets[:2].tolist() == [[2, 3], [4, 5]]
    assert evaluation.n_targets == 4
    assert "bytes" not in DocumentEvaluation([[1, 2, 3]] * 4, [0], 2, 1, 9, max_batches=1).summary(
        1.0, 2
    )  # not of a part
    with pytest.raises(UserError, match="no held-out tokens"):
        DocumentEvaluation([[5], []], [], 2, 1, 9)
    with pytest.raises(UserError, match="outside the vocabulary"):
        evaluation.check(5, "text")


def test_held_out_examples_count_answers_alone(tmp_path):
    pairs = [([1, 2], [3, 4]), ([5], [6]), ([7, 8, 9], [1, 2])]
    write_examples(tmp_path / "a.npz", pairs, Tokenizer([]))
    lengths = np.arange(257, dtype=np.int32)
    evaluation = ExampleEvaluation(tmp_path / "a.npz", None, 2, lengths)
    assert (evaluation.seq_len, evaluation.n_batches, evaluation.n_targets) == (4, 2, 5)
    batches = list(evaluation.batches())
    counted = [target[target != -100].tolist() for _, targets in batches for target in targets]
    assert counted == [[3, 4], [6], [1, 2], []]
    assert batches[0][0][0].tolist() == [1, 2, 3, 0]
    assert evaluation.summary(5.0, 5)["bytes"] == 3 + 4 + 6 + 1 + 2
    with pytest.raises(UserError, match="longest example has 5 tokens, so `seq_len` must be at least 4"):
        ExampleEvaluation(tmp_path / "a.npz", 3, 2)


def test_an_evaluation_can_be_stopped():
    evaluation = Evaluation(np.arange(100), 4, 2)
    asked = []
    evaluation.stop = lambda: len(asked) == 3
    batches = evaluation.batches()
    for _ in range(3):
        asked.append(next(batches))
    with pytest.raises(Stopped):
        next(batches)
