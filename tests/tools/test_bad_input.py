"""One clear line for every bad input, before any work."""

import json

import pytest

from llm_common import errors
from llm_tools.frameworks import open_backend


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("train_tokenizer", ["--data", "{}/nothing"], "no such file or folder"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--vocab-size", 100], "vocab_size = 100 is too small"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--special-tokens", "<a>", "<a>"], "'<a>' is there twice"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--out", "{}/x.bin"], "a .json file, or a folder"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--processes", 0], "--processes 0: at least 1"),
        ("prepare_data", ["--tokenizer", "{}/nothing.json"], "no such tokenizer"),
        ("inspect_data", ["--tokenizer", "{}/nothing.json"], "no such tokenizer"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--preset", "huge"], "unknown preset 'huge'"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--lr-max", "nan"], "--lr-max nan: must be"),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--seq-len", "513", "--model-config", "{}/config.json"],
            "seq_len needs 513 positions",
        ),
        ("train", ["--framework", "jax", "--out", "{}/x", "--tokenizer", "{}/nothing"], "no such tokenizer"),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--save-every", "0"],
            "--save-every 0: must be an integer of at least 1 or none",
        ),
        ("train", ["--out", "{}/x"], "--framework is missing"),
        ("train", ["--framework", "jax"], "--out is missing"),
        ("train", ["--config", "{}/nothing.toml"], "nothing.toml: no such file"),
        (
            "train_tokenizer",
            ["--data", "{}/text.txt", "--vocab-size", 260, "--out", "{}/text.txt/x"],
            "give another place",
        ),
        (
            "train",
            ["--config", "{}/config.json"],
            "a TOML file is expected; a model's config.json goes to --model-config",
        ),
        ("train", ["--config", "{}/unknown.toml"], "unknown key 'learning_rate'; known keys: attention_backend"),
        ("train", ["--config", "{}/wrong.toml"], "batch_size = '8' is not what --batch-size takes"),
        ("train", ["--config", "{}/choice.toml"], "framework = 'numpy'; known: jax, torch"),
        ("train", ["--config", "{}/twice.toml"], "key 'seed' is there twice"),
        ("train", ["--config", "{}/broken.toml"], "broken.toml: not TOML"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--preset", "tiny", "--init-from", "{}"], "give one of them"),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--gradient-accumulation-steps", "3"],
            "must divide batch_size",
        ),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--remat", "some"],
            "--remat 'some' is not known; known: none, dots",
        ),
        ("train", ["--framework", "jax", "--out", "{}/x", "--init-from", "{}"], "has a config.json but no weights"),
        (
            "evaluate",
            ["--framework", "jax", "--checkpoint", "{}", "--text", "{}/text.txt"],
            "has a config.json but no weights",
        ),
        ("prepare_data", ["--tokenizer", "{}/nothing", "--validation", "1.5"], "--validation 1.5: must lie in [0, 1)"),
        ("prepare_data", ["--tokenizer", "{}/none.toml/", "--prompt-field", "q"], "no such tokenizer"),
        ("export", ["--checkpoint", "{}", "--out", "{}"], "is there already; nothing is overwritten"),
        ("plot_runs", ["{}"], "has no log.jsonl; is this the folder of a run?"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}"], "has a config.json but no weights"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}/x"], "x: no such folder"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}", "--top-p", "2"], "--top-p 2.0"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}", "--texts", "0"], "--texts 0"),
    ],
)
def test_bad_input_is_one_clear_line(name, flags, words, folder, run):
    code, out, err = run(name, *(str(flag).replace("{}", str(folder)) for flag in flags))
    assert code == 2
    assert err.startswith("error: ")
    assert words.replace("{}", str(folder)) in err
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
            "--model-config",
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
    with pytest.raises(errors.UserError, match=rf"{framework} is not installed; run: pip install .*'{framework}>="):
        open_backend(framework)


def test_a_toml_file_stands_for_the_flags(prepared, folder, run, tmp_path):
    code, out, err = run("train", *prepared, "--framework", "jax", "--out", tmp_path, "--total-steps", 4)
    assert code == 0, err
    state = json.loads((tmp_path / "step-00000004" / "state.json").read_text())
    assert state["settings"]["train"]["batch_size"] == 4
    assert state["settings"]["optimizer"]["max_grad_norm"] is None
    assert state["settings"]["optimizer"]["total_steps"] == 4  # the flag goes before the file
    assert state["settings"]["evaluation"]["bits_per_byte"] > 1
    assert "held-out loss" in out
    assert "bits per byte" in out


def test_dry_run_says_what_would_be(prepared, run, tmp_path):
    code, out, _ = run("train", *prepared, "--framework", "torch", "--out", tmp_path / "x", "--dry-run")
    assert code == 0
    for words in ("parameters", "work: ", "memory: about", "first batch: 4 x 32, 128 counted targets", "target 0:"):
        assert words in out
    assert not (tmp_path / "x").exists()


def test_the_memory_said_counts_the_scores_that_are_kept(prepared, run, tmp_path):
    """On a CPU torch's fused attention keeps none; JAX's, XLA's own, keeps them as the reference does."""

    def activations(framework: str, backend: str) -> str:
        flags = ("--framework", framework, "--attention-backend", backend, "--out", tmp_path / "x", "--dry-run")
        _, out, _ = run("train", *prepared, *flags, "--seq-len", 32, "--batch-size", 64)
        return out.partition("activations ")[2].partition(")")[0]

    assert activations("jax", "fused") == activations("jax", "reference")
    assert float(activations("torch", "auto")) < float(activations("torch", "reference"))
