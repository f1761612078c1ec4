"""The scripts as a user types them: from text to a generated text, and one clear line for every bad input."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_common import errors
from llm_common.config import preset
from llm_common.corpus import python_documentation

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script by name with flags; returns exit code, output and error output."""

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        monkeypatch.syspath_prepend(str(SCRIPTS))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and the config of a tiny model."""
    path = tmp_path_factory.mktemp("scripts")
    text = "<|endoftext|>".join(t for _, t in zip(range(20), python_documentation(), strict=False))
    (path / "text.txt").write_text(text, encoding="utf-8")
    config = {**preset("tiny").to_hf(), "vocab_size": 300}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_from_text_to_the_same_text_in_both_frameworks(folder, run):
    tokenizer, tokens = folder / "bpe.json", folder / "tokens.npy"
    code, out, _ = run("train_tokenizer", "--data", folder / "text.txt", "--out", tokenizer, "--vocab-size", 300)
    assert (code, "43 merges, 300 ids" in out) == (0, True)
    code, out, _ = run("prepare_data", "--data", folder / "text.txt", "--out", tokens, "--tokenizer", tokenizer)
    assert code == 0
    assert "20 documents" in out
    common = ["--config", folder / "config.json", "--data", tokens, "--tokenizer", tokenizer]
    common += [
        "--seq-len",
        32,
        "--batch-size",
        4,
        "--total-steps",
        6,
        "--save-every",
        3,
        "--log-every",
        2,
        "--device",
        "cpu",
    ]
    texts, logs = {}, {}
    for framework in ("jax", "torch"):
        code, out, err = run("train", "--framework", framework, "--out", folder / framework, *common)
        assert code == 0, err
        assert "step 6  loss" in out
        assert [p.name for p in sorted((folder / framework).glob("step-*"))] == ["step-00000003", "step-00000006"]
        rows = [json.loads(line) for line in (folder / framework / "log.jsonl").read_text().splitlines()]
        assert rows[0]["framework"] == framework
        logs[framework] = [row["loss"] for row in rows[1:]]
    np.testing.assert_allclose(logs["jax"], logs["torch"], atol=1e-4)
    flags = ["--checkpoint", folder / "jax", "--prompt", "The ", "--seed", 5, "--max-new-tokens", 20, "--texts", 2]
    for framework in ("jax", "torch"):
        code, texts[framework], err = run("generate", "--framework", framework, "--device", "cpu", *flags)
        assert code == 0, err
    assert texts["jax"] == texts["torch"]
    assert texts["jax"].count("The ") == 2
    # the same command again has nothing left to do, and other settings are refused
    code, out, _ = run("train", "--framework", "torch", "--out", folder / "jax", *common)
    assert (code, "nothing left to do" in out) == (0, True)
    code, _, err = run("train", "--framework", "jax", "--out", folder / "jax", *common, "--lr-max", "2e-3")
    assert (code, "optimizer.lr_max = 0.001 here, 0.002 asked for" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("train_tokenizer", ["--data", "{}/nothing"], "no such file or folder"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--vocab-size", 100], "vocab_size = 100 is too small"),
        ("prepare_data", ["--tokenizer", "{}/nothing.json"], "no such tokenizer"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--preset", "huge"], "unknown preset 'huge'"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--lr-max", "nan"], "lr_max = nan"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--seq-len", "513"], "seq_len needs 513 positions"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--tokenizer", "{}/nothing"], "no such tokenizer"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--save-every", "0"], "--save-every must be at least 1"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}"], "model.safetensors: no such file"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}/x"], "config.json: no such file"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}", "--top-p", "2"], "top_p = 2.0"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}", "--texts", "0"], "--texts 0"),
    ],
)
def test_bad_input_is_one_clear_line(name, flags, words, folder, run):
    code, out, err = run(name, *(str(flag).replace("{}", str(folder)) for flag in flags))
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out + err


def test_a_device_that_is_not_there_is_refused_before_training(folder, run):
    run("train_tokenizer", "--data", folder / "text.txt", "--out", folder / "bpe.json", "--vocab-size", 300)
    run(
        "prepare_data",
        "--data",
        folder / "text.txt",
        "--out",
        folder / "tokens.npy",
        "--tokenizer",
        folder / "bpe.json",
    )
    for framework in ("jax", "torch"):
        flags = [
            "--config",
            folder / "config.json",
            "--data",
            folder / "tokens.npy",
            "--tokenizer",
            folder / "bpe.json",
        ]
        code, _, err = run(
            "train", "--framework", framework, "--out", folder / "none", "--seq-len", 32, *flags, "--device", "tpu"
        )
        assert code == 2
        assert "tpu" in err
        assert len(err.splitlines()) == 1
        assert not (folder / "none").exists()


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_missing_framework_names_the_command(framework, monkeypatch):
    find = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == framework else find(name))
    with pytest.raises(errors.UserError, match=rf"{framework} is not installed; run: pip install '.\[{framework}\]'"):
        errors.import_side(framework, "checkpoint")
