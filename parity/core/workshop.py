"""A folder with a tokenizer, texts and a config, and the programs of the repository called on it as from a command
line.
"""

import contextlib
import importlib.util
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from llm_common.text import bpe_reference
from llm_common.text.tokenizer import Tokenizer

FRAMEWORKS = ("jax", "torch")
END = "<|endoftext|>"
CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 301, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 40,
    "rms_norm_eps": 3e-5, "rope_theta": 300.0, "tie_word_embeddings": False,
}  # fmt: skip


class Workshop:
    """A folder with a tokenizer, texts, a config and what the programs make of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = "low lower lowest new newer newest wide wider widest, naïve café 你好. " * 3
        self.merges = bpe_reference.train([text], 44, END)
        self.letters = [bytes([b]) for b in range(256)] + [a + b for a, b in self.merges]
        self.bytes_of_ids = np.array([*map(len, self.letters), 0])
        words = [w for w in text.split() if w]
        rng = np.random.default_rng(5)
        self.documents = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(40)]
        Tokenizer(self.merges, fast=False).save(folder / "bpe.json")
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        (folder / "text.txt").write_text(END.join(self.documents), encoding="utf-8")
        self.train_flags: list[Any] = []
        self.spec: dict[str, Any] = {}  # the specification's run, once it is made

    @property
    def end(self) -> int:
        return len(self.letters)

    def ids(self, text: str) -> list[int]:
        return bpe_reference.encode(text, self.merges, END)

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.letters[i] for i in ids).decode("utf-8", "replace")


def load_script(name: str) -> ModuleType:
    """A program of `one-model` as a module of its own, run as little as an import runs it."""
    found = importlib.util.find_spec(f"llm_tools.programs.{name}")
    assert found is not None and found.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def call(name: str, *arguments: object) -> str:
    """What a program prints, called as from a command line; its notes are for who calls it by hand."""
    module, out, notes = load_script(name), io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        module.main(sys.argv[1:])
    return out.getvalue()


def flat(flags: dict[str, Any]) -> list[Any]:
    return [x for pair in flags.items() for x in pair]


def log_numbers(path: Path) -> dict[str, float]:
    """The numbers that a run's log has, by name and step; one that is there twice is no number."""
    found: dict[str, float] = {}

    def add(numbers: dict[str, float]) -> None:
        found.update({key: math.nan if key in found else x for key, x in numbers.items()})

    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("event") == "evaluation":
            keys = ("loss", "perplexity", "tokens", "bytes", "bits_per_byte")
            add({f"held-out {key} after step {row['step']}": row[key] for key in keys if key in row})
        elif "event" not in row and "loss" in row:
            keys = ("loss", "grad_norm", "lr", "skipped")
            add({f"{key} of step {row['step']}": float(row[key]) for key in keys if key in row})
    return found


def recorded_losses(path: Path) -> dict[str, float]:
    """The held-out loss that every checkpoint of a run says it has."""
    states = {x.parent.name: json.loads(x.read_text(encoding="utf-8")) for x in path.glob("step-*/state.json")}
    return {name: state["settings"].get("evaluation", {}).get("loss", math.nan) for name, state in states.items()}
