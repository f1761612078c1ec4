"""What several tests of programs begin from."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from llm_common.config import preset
from llm_common.text.corpus import python_documentation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and the config of a tiny model."""
    path = tmp_path_factory.mktemp("scripts")
    text = "<|endoftext|>".join(t for _, t in zip(range(20), python_documentation(), strict=False))
    (path / "text.txt").write_text(text, encoding="utf-8")
    config = {**preset("tiny").to_hf(), "vocab_size": 300}
    (path / "config.json").write_text(json.dumps(config))
    for name, text in {
        "unknown": "[optimizer]\nlearning_rate = 1.0",
        "wrong": "batch_size = '8'",
        "choice": "framework = 'numpy'",
        "twice": "seed = 1\n[training]\nseed = 2",
        "broken": "seed = ",
    }.items():
        (path / f"{name}.toml").write_text(text)
    return path


@pytest.fixture
def prepared(folder, run):
    """A folder with a tokenizer, tokens, held-out tokens, and the flags of a small run on them."""
    if not (folder / "p-validation.npy").exists():
        flags = ["--data", folder / "text.txt"]
        run("train_tokenizer", *flags, "--out", folder / "bpe.json", "--vocab-size", 300)
        flags += ["--tokenizer", folder / "bpe.json", "--out", folder / "p.npy", "--validation", 0.3]
        assert run("prepare_data", *flags)[0] == 0
    toml = folder / "run.toml"
    toml.write_text(
        f"""
        model_config = "{folder}/config.json"
        data = "{folder}/p.npy"
        tokenizer = "{folder}/bpe.json"
        cache_dir = "{folder}/cache"
        device = "cpu"
        [training]
        seq_len = 32
        batch_size = 4
        [optimizer]
        total_steps = 12
        max_grad_norm = "none"
        [run]
        save_every = 4
        keep_last = 2
        log_every = 4
        """
    )
    return ["--config", toml]


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
