"""What the scripts answer is right: evaluation is the run's, text stops where it ends, nothing that is no number
passes.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_common.config import preset
from llm_common.files.export import export
from llm_common.files.tensor_files import write_tensors
from llm_common.run.checkpoint import load_weights
from llm_common.run.log import read_log
from llm_common.text.tokenizer import Tokenizer
from parity.core.inputs import random_weights

ROOT = Path(__file__).parents[2]
CONFIG = {**preset("tiny").to_hf(), "vocab_size": 260}
CPU = ["--device", "cpu"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, questions, a config, and the tokenizer of a chat model, whose eos_token ends a turn."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("answers")
    (path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 264}))
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"word {i} " * (i % 9 + 1)}) for i in range(60)))
    pairs = [{"q": f"{i}?", "a": "ABCD"[i % 4]} for i in range(12)]
    (path / "questions.json").write_text(json.dumps(pairs))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, []))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (path / "chat").mkdir()
    t.save(str(path / "chat" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (path / "chat" / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def common(folder, **more):
    flags = {"--model-config": folder / "config.json", "--tokenizer": folder / "chat", **more}
    flags = {"--seq-len": 32, "--batch-size": 4, "--total-steps": 6, "--lr-max": 1e-2, "--lr-min": 1e-3, **flags}
    return [x for pair in flags.items() if pair[1] is not None for x in pair] + CPU


def losses(path, event=None):
    return [row["loss"] for row in read_log(path / "log.jsonl") if row.get("event") == event and "loss" in row]


def test_questions_are_seen_by_their_answers_whatever_ends_a_document(folder, run, tmp_path):
    """The id that ends a turn is no end of a document: a document mask changes no example."""
    flags = [
        "--tokenizer",
        folder / "chat",
        "--data",
        folder / "questions.json",
        "--prompt-field",
        "q",
        "--answer-field",
        "a",
    ]
    code, out, err = run("prepare_data", *flags, "--chat", "--out", tmp_path / "q.npz", "--validation", 0.3)
    assert (code, err) == (0, "")
    assert (tmp_path / "q-validation.npz").is_file()
    assert (folder / "questions.json").read_text().startswith("[")  # the source is not what describes the data
    for mask in ([], ["--document-mask"]):
        flags = [*common(folder, **{"--data": tmp_path / "q.npz", "--out": tmp_path / f"run{len(mask)}"}), *mask]
        code, out, err = run("train", "--framework", "torch", *flags)
        assert code == 0, err
    assert losses(tmp_path / "run0") == losses(tmp_path / "run1")
    assert losses(tmp_path / "run0", "evaluation") == losses(tmp_path / "run1", "evaluation") != []
    # the held-out loss of the run is the one that evaluate.py gives, in both frameworks
    for framework in ("jax", "torch"):
        flags = ["--checkpoint", tmp_path / "run1", "--data", tmp_path / "q-validation.npz", "--json", *CPU]
        code, out, err = run("evaluate", "--framework", framework, *flags)
        assert code == 0, err
        assert json.loads(out)["loss"] == pytest.approx(losses(tmp_path / "run1", "evaluation")[-1], abs=1e-6)
    code, out, err = run("inspect_data", "--data", tmp_path / "q.npz", "--tokenizer", folder / "chat")
    assert (code, "; only the answers are learned" in out, "answer: '" in out) == (0, True, True)
    # and generation stops where answers were trained to end
    (newest,) = (tmp_path / "run1").glob("step-*")
    im_end = 258
    assert json.loads((newest / "config.json").read_text())["eos_token_id"] == im_end
    assert json.loads((newest / "generation_config.json").read_text())["eos_token_id"] == im_end


def test_chat_text_in_token_files(folder, run, tmp_path):
    """Turns end inside documents: the mask separates at the end of documents alone."""
    chat = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"text": chat}) for _ in range(8)))
    flags = ["--tokenizer", folder / "chat", "--data", tmp_path / "chat.jsonl", "--out", tmp_path / "c.npy"]
    code, _, err = run("prepare_data", *flags, "--special-tokens-in-text")
    assert (code, err) == (0, "")
    ids = np.load(tmp_path / "c.npy")
    assert ((ids == 258).sum(), (ids == 256).sum()) == (16, 8)
    flags = common(folder, **{"--data": tmp_path / "c.npy", "--out": tmp_path / "run", "--total-steps": 1})
    code, _, err = run("train", "--framework", "jax", *flags, "--document-mask")
    assert code == 0, err
    (state,) = (tmp_path / "run").glob("step-*/state.json")
    assert json.loads(state.read_text())["settings"]["train"]["document_separator"] == 256
    # an end that is inside documents would hide their beginning: refused
    run(
        "prepare_data", *flags_of(folder, tmp_path, "d.npy"), "--special-tokens-in-text", "--document-end", "<|im_end|>"
    )
    flags = common(folder, **{"--data": tmp_path / "d.npy", "--out": tmp_path / "run2"})
    code, _out, err = run("train", "--framework", "jax", *flags, "--document-mask")
    assert (code, "258, stands 16 times inside one" in err) == (2, True)


def flags_of(folder, tmp_path, name):
    return ["--tokenizer", folder / "chat", "--data", tmp_path / "chat.jsonl", "--out", tmp_path / name]


def test_evaluation_is_the_runs(folder, run, tmp_path):
    """Window, mask, dtype and batches are the run's unless a flag says otherwise."""
    flags = ["--tokenizer", folder / "chat", "--data", folder / "text.jsonl", "--out", tmp_path / "t.npy"]
    assert run("prepare_data", *flags, "--validation", 0.4)[0] == 0
    for mask in ([], ["--document-mask"]):
        out = tmp_path / f"run{len(mask)}"
        flags = [
            *common(folder, **{"--data": tmp_path / "t.npy", "--out": out, "--seq-len": 48}),
            "--eval-batches",
            2,
            *mask,
        ]
        assert run("train", "--framework", "torch", *flags)[0] == 0
        flags = ["--checkpoint", out, "--data", tmp_path / "t-validation.npy", "--json", *CPU]
        found = {}
        for framework in ("jax", "torch"):
            code, text, err = run("evaluate", "--framework", framework, *flags)
            assert code == 0, err
            found[framework] = json.loads(text)
            assert found[framework]["loss"] == pytest.approx(losses(out, "evaluation")[-1], abs=1e-6)
            assert found[framework]["tokens"] == 2 * 4 * 48
        code, text, err = run("evaluate", "--framework", "jax", *flags, "--batches", "all", "--seq-len", 16)
        assert json.loads(text)["tokens"] == len(np.load(tmp_path / "t-validation.npy")) - 1
    assert losses(tmp_path / "run0", "evaluation") != losses(tmp_path / "run1", "evaluation")


def test_text_stops_at_what_any_file_names(folder, run, tmp_path):
    """A model that draws one id for ever: the config, the generation config and --stop-token each end it."""
    cfg = dataclasses.replace(preset("tiny"), vocab_size=264)
    weights = {name: np.zeros_like(x) for name, x in random_weights(cfg, 0, "float32").items()}
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"][:, 0] = 1
    weights["lm_head.weight"][70, 0] = 5
    from llm_common.text.hf_tokenizer import HfTokenizer

    export(tmp_path / "model", cfg, weights, HfTokenizer(folder / "chat"))
    flags = ["--framework", "both", "--checkpoint", tmp_path / "model", "--prompt", "a", "--temperature", 0, *CPU]
    code, out, err = run("generate", *flags, "--max-new-tokens", 5)
    assert (code, "[the same 5 tokens in both frameworks]" in out) == (0, True), err
    for name, content in (
        ("config.json", {**cfg.to_hf(), "eos_token_id": [3, 70]}),
        ("generation_config.json", {"eos_token_id": 70}),
    ):
        before = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_text(json.dumps(content))
        code, out, err = run("generate", *flags, "--max-new-tokens", 5)
        assert (code, "[the same 0 tokens in both frameworks]" in out) == (0, True), err
        code, out, err = run("generate", *flags, "--max-new-tokens", 5, "--ignore-eos")
        assert "[the same 5 tokens in both frameworks]" in out
        (tmp_path / "model" / name).write_bytes(before)
    code, out, err = run("generate", *flags, "--max-new-tokens", 5, "--stop-token", 70)
    assert "[the same 0 tokens in both frameworks]" in out
    code, out, err = run("generate", *flags, "--max-new-tokens", 5, "--stop-token", "<nothing>")
    assert (code, "--stop-token <nothing>: the tokenizer has no such token" in err) == (2, True)


def test_numbers_that_are_none(folder, run, tmp_path):
    """NaN weights, and weights so large that an activation overflows: every program says which tensor, and exits with
    2.
    """
    cfg = dataclasses.replace(preset("tiny"), vocab_size=257)
    good = random_weights(cfg, 0, "float32")
    export(tmp_path / "nan", cfg, good, Tokenizer([]))
    export(
        tmp_path / "huge",
        cfg,
        {n: x * (1e38 if n.endswith("0.mlp.down_proj.weight") else 1) for n, x in good.items()},
        Tokenizer([]),
    )
    tensors = {name: np.array(x) for name, x in load_weights(tmp_path / "nan")[1].items()}
    tensors["model.layers.0.mlp.down_proj.weight"][2, 3] = np.nan
    write_tensors(tmp_path / "nan" / "model.safetensors", tensors)
    (tmp_path / "text.txt").write_text("some text\n")
    for name, words in (
        ("nan", "'model.layers.0.mlp.down_proj.weight' is not finite"),
        ("huge", "is the first tensor that is not finite"),
    ):
        for framework in ("jax", "torch"):
            flags = ["--framework", framework, "--checkpoint", tmp_path / name, *CPU]
            code, _, err = run("generate", *flags, "--prompt", "a", "--max-new-tokens", 3)
            assert (code, words in err, err.count("\n")) == (2, True, 1), err
            code, _, err = run("evaluate", *flags, "--text", tmp_path / "text.txt")
            assert (code, words in err, err.count("\n")) == (2, True, 1), err
        code, _, err = run("generate", *flags[2:], "--framework", "both", "--prompt", "a", "--max-new-tokens", 3)
        assert (code, words in err) == (2, True)
    code, _, err = run("export", "--checkpoint", tmp_path / "nan", "--out", tmp_path / "e")
    assert (code, "is not finite" in err, (tmp_path / "e").exists()) == (2, True, False)
    code, _, err = run("export", "--checkpoint", tmp_path / "huge", "--out", tmp_path / "e", "--dtype", "float16")
    assert (code, "is not in the range of float16" in err, (tmp_path / "e").exists()) == (2, True, False)
    flags = ["--init-from", tmp_path / "nan", "--data", tmp_path / "t.npy", "--out", tmp_path / "run"]
    flags += ["--seq-len", 4, "--batch-size", 1]
    run("prepare_data", "--tokenizer", tmp_path / "nan", "--data", tmp_path / "text.txt", "--out", tmp_path / "t.npy")
    code, _out, err = run("train", "--framework", "torch", *flags, *CPU)
    assert (code, "is not finite" in err) == (2, True), err


def test_many_prompts_are_worked_on_in_batches(folder, run, tmp_path):
    """The same texts in batches of any size; a newline alone ends a prompt."""
    cfg = dataclasses.replace(preset("tiny"), vocab_size=257)
    export(tmp_path / "m", cfg, random_weights(cfg, 0, "float32"), Tokenizer([]))
    prompts = ["one", "two\u2028lines", "three\x0cpages", "f\u0085our", "five\rsix"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode() + b"\n\n")
    flags = ["--checkpoint", tmp_path / "m", "--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", 4, *CPU]
    outputs = []
    for size in (1, 2, 64):
        code, out, err = run("generate", "--framework", "torch", *flags, "--texts", 2, "--batch-size", size)
        assert code == 0, err
        outputs.append(out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert [f"--- prompt {i}, text {n}" in outputs[0] for i in range(5) for n in range(2)] == [True] * 10
    assert "--- prompt 5" not in outputs[0]
    assert all(prompt in outputs[0] for prompt in prompts)


def test_half_a_pair_on_the_command_line(folder, run, tmp_path):
    cfg = dataclasses.replace(preset("tiny"), vocab_size=257)
    export(tmp_path / "m", cfg, random_weights(cfg, 0, "float32"), Tokenizer([]))
    flags = ["--checkpoint", tmp_path / "m", "--max-new-tokens", 2, "--stop", "\udc80", *CPU]
    code, out, err = run("generate", "--framework", "torch", *flags, "--prompt", "a\udcffb")
    assert (code, out.startswith("a\ufffdb")) == (0, True), err


def test_a_run_is_extended_with_its_moments(folder, run, tmp_path):
    flags = ["--tokenizer", folder / "chat", "--data", folder / "text.jsonl", "--out", tmp_path / "t.npy"]
    assert run("prepare_data", *flags)[0] == 0
    flags = lambda out, steps: common(folder, **{"--data": tmp_path / "t.npy", "--out": out, "--total-steps": steps})
    for framework, steps in (("jax", 4), ("torch", 7)):
        code, out, err = run("train", "--framework", framework, *flags(tmp_path / "run", steps))
        assert code == 0, err
    assert (
        "extended from 4 to 7 steps: the learning rate follows the new total from step 4 on, the moments are kept"
        in out
    )
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if "event" not in row]
    assert [row["step"] for row in rows] == list(range(1, 8))
    from llm_common.config import OptimizerConfig
    from llm_common.schedule import learning_rate

    for row in rows:
        opt = OptimizerConfig(lr_max=1e-2, lr_min=1e-3, total_steps=4 if row["step"] <= 4 else 7)
        assert row["lr"] == pytest.approx(learning_rate(opt, row["step"] - 1))
    code, out, err = run("train", "--framework", "jax", *flags(tmp_path / "run", 5))
    assert (code, "a run may become longer, not shorter" in err) == (2, True)
    # a run's folder is a place to start from, too
    more = {"--model-config": None, "--data": tmp_path / "t.npy", "--out": tmp_path / "tuned", "--total-steps": 2}
    more = common(folder, **more, **{"--init-from": tmp_path / "run"})
    code, out, err = run("train", "--framework", "torch", *more)
    assert code == 0, err


@pytest.mark.parametrize("script", ["prepare_data", "train_tokenizer"])
def test_workers_end_with_the_program_that_began_them(script, tmp_path):
    """However it ended: one that is killed can tell nobody."""
    tokenizer = tmp_path / "bpe.json"
    Tokenizer([]).save(tokenizer)
    (tmp_path / "text.txt").write_text("some words <|endoftext|>" * 2_000_000)
    flags = {
        "prepare_data": ["--tokenizer", tokenizer, "--out", tmp_path / "data", "--part-size", 20_000, "--data"],
        "train_tokenizer": ["--out", tmp_path / "t.json", "--input"],
    }[script]
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *flags, tmp_path / "text.txt", "--processes", 3]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def children() -> set[int]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process.pid:
                found.add(int(path.parent.name))
        return found

    deadline = time.monotonic() + 60
    while len(workers := children()) < 4 and time.monotonic() < deadline:  # three workers, and what watches semaphores
        time.sleep(0.05)
    assert len(workers) >= 4
    process.send_signal(signal.SIGKILL)
    process.wait()

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_nothing_of_the_users_is_overwritten(folder, run, tmp_path):
    """A text, somebody's tokenizer, an array, and the log of a run whose checkpoints are gone."""
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"text": "some words " * 50}] * 20))
    code, _, err = run("train_tokenizer", "--input", text, "--vocab-size", 280, "--out", text)
    assert (code, "is no tokenizer of this program" in err) == (2, True)
    code, _, err = run("train_tokenizer", "--input", text, "--vocab-size", 280, "--out", folder / "chat")
    assert (code, "holds somebody's tokenizer.json" in err) == (2, True)
    data = ["--tokenizer", folder / "chat", "--data", text, "--out", tmp_path / "t.npy"]
    assert run("prepare_data", *data, "--validation", 0.3)[0] in (0, 2)  # of equal documents one side is empty
    run(
        "prepare_data",
        "--tokenizer",
        folder / "chat",
        "--data",
        folder / "text.jsonl",
        "--out",
        tmp_path / "t.npy",
        "--validation",
        0.3,
    )
    run("prepare_data", "--tokenizer", folder / "chat", "--data", folder / "text.jsonl", "--out", tmp_path / "t.npy")
    flags = common(folder, **{"--data": tmp_path / "t.npy", "--out": tmp_path / "run", "--total-steps": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    code, out, err = run("train", "--framework", "torch", *flags)
    assert (code, "nothing held out" in out) == (0, True), err
    assert "t-validation.npy is not taken" in err  # all of it is in the training data now
    assert read_log(tmp_path / "run" / "log.jsonl.before-1") == [{"step": 7, "loss": 1.0}]
    assert losses(tmp_path / "run") != []


def test_who_reads_may_stop_reading(folder, tmp_path):
    """A closed pipe and a full disk under what is printed are no tracebacks."""
    cfg = dataclasses.replace(preset("tiny"), vocab_size=257)
    export(tmp_path / "m", cfg, random_weights(cfg, 0, "float32"), Tokenizer([]))
    flags = [
        "--framework",
        "torch",
        *CPU,
        "--checkpoint",
        tmp_path / "m",
        "--prompt",
        "a",
        "--texts",
        64,
        "--batch-size",
        4,
    ]
    command = [sys.executable, ROOT / "scripts" / "generate.py", *flags, "--max-new-tokens", 2]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("--- prompt 0")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait()
    process.stderr.close()
    with open("/dev/full", "w") as full:
        result = subprocess.run(list(map(str, command)), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in result.stderr
