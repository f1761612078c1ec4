"""Checkpoint folders, in NumPy: what `jax_llm.checkpoint` and `torch_llm.checkpoint` both write and both read.

    step-00001000/
      config.json            the model, as transformers reads it
      model.safetensors      master weights under their canonical names
      optimizer.safetensors  mu.<name> and nu.<name>
      bpe.json               the tokenizer, if the run has one
      state.json             counters, seed, settings, sha256 of every other file; written last, as the commit mark

The folder is written under a temporary name and renamed when it is complete, so an interrupted save leaves the previous
checkpoint as it was. There is no pickle anywhere.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig
from llm_common.data import TokenDataset
from llm_common.errors import UserError
from llm_common.tensors import check_tensors, read_tensors, sync, write_tensors
from llm_common.tokenizer import FILE_NAME as TOKENIZER_FILE
from llm_common.tokenizer import Tokenizer

FORMAT = 1
CONFIG_FILE, MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = (
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
)


@dataclass
class TrainingState:
    """Everything a run needs to go on, in either framework. Arrays are canonical tensors in the master dtype."""

    weights: dict[str, np.ndarray]
    mu: dict[str, np.ndarray]
    nu: dict[str, np.ndarray]
    step: int  # steps made, which decides the data and the learning rate
    adam_count: int  # updates made: fewer than `step` if some were skipped


def save_checkpoint(
    run: Path,
    cfg: ModelConfig,
    state: TrainingState,
    settings: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write `run/step-XXXXXXXX`; returns it. `settings` is any JSON: hyper-parameters, data fingerprint, framework."""
    folder = run / f"step-{state.step:08d}"
    partial = run / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_text(partial / CONFIG_FILE, json.dumps(cfg.to_hf(), indent=2) + "\n")
    write_tensors(partial / MODEL_FILE, state.weights)
    moments = {f"mu.{name}": x for name, x in state.mu.items()} | {f"nu.{name}": x for name, x in state.nu.items()}
    write_tensors(partial / OPTIMIZER_FILE, moments)
    if tokenizer is not None:
        tokenizer.save(partial / TOKENIZER_FILE)
        sync(partial / TOKENIZER_FILE)
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())}
    content = {
        "format": FORMAT,
        "step": state.step,
        "adam_count": state.adam_count,
        "files": files,
        "settings": settings,
    }
    _write_text(partial / STATE_FILE, json.dumps(content, indent=2) + "\n")
    sync(partial)
    if folder.exists():  # the same step saved again: the old one steps aside and goes only when the new one is in place
        aside = run / f".{folder.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside)
    else:
        os.rename(partial, folder)
    sync(run)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    folders = sorted(run.glob("step-*")) if run.is_dir() else []
    complete = [folder for folder in folders if (folder / STATE_FILE).is_file()]
    return complete[-1] if complete else None


def load_config(folder: Path) -> ModelConfig:
    """The model config of a checkpoint or of a Hugging Face folder."""
    return ModelConfig.from_file(folder / CONFIG_FILE)


def load_weights(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights alone: of a training checkpoint, or of any folder with config.json and model.safetensors."""
    cfg = load_config(folder)
    weights = read_tensors(folder / MODEL_FILE)
    check_tensors(cfg, weights, str(folder / MODEL_FILE))
    return cfg, weights


def load_checkpoint(folder: Path, cfg: ModelConfig | None = None) -> tuple[ModelConfig, TrainingState, dict[str, Any]]:
    """Config, training state and settings of a checkpoint, after checking every file's size and sha256.

    Raises UserError, naming the file or the field, if the checkpoint is incomplete, damaged, of a newer format, or, with
    `cfg` given, of another model.
    """
    content = _read_json(folder / STATE_FILE)
    if content.get("format") != FORMAT:
        raise UserError(f"{folder}: checkpoint format {content.get('format')!r}, but this version reads {FORMAT}")
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is incomplete, use an earlier one")
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: damaged (its sha256 is not the recorded one); use an earlier checkpoint")
    saved_cfg, weights = load_weights(folder)
    if cfg is not None and cfg != saved_cfg:
        saved, asked = asdict(saved_cfg), asdict(cfg)
        differing = [
            f"{key} = {saved[key]!r} here, {asked[key]!r} asked for" for key in saved if saved[key] != asked[key]
        ]
        raise UserError(f"{folder}: checkpoint of another model: {'; '.join(differing)}")
    moments = read_tensors(folder / OPTIMIZER_FILE)
    mu, nu = ({name[3:]: x for name, x in moments.items() if name.startswith(prefix)} for prefix in ("mu.", "nu."))
    for moment, label in ((mu, "mu"), (nu, "nu")):
        check_tensors(saved_cfg, moment, f"{folder / OPTIMIZER_FILE} ({label})")
    state = TrainingState(weights, mu, nu, content["step"], content["adam_count"])
    return saved_cfg, state, content["settings"]


def run_settings(train: TrainConfig, opt: OptimizerConfig, dataset: TokenDataset) -> dict[str, Any]:
    """What a checkpoint records of its run, as JSON."""
    return {"train": asdict(train), "optimizer": asdict(opt), "data": dataset.fingerprint()}


def check_resumable(folder: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UserError, naming every differing field, unless a run may go on from the checkpoint `folder`.

    The framework and the attention backend may change: the results agree. Everything else would silently be another run.
    """
    differing = []
    for part, values in asked.items():
        for key, value in values.items():
            old = saved.get(part, {}).get(key)
            if old != value and key != "attention_backend":
                differing.append(f"{part}.{key} = {old!r} here, {value!r} asked for")
    if differing:
        raise UserError(f"{folder}: the run was started with other settings: {'; '.join(differing)}; use another --out")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer saved with a checkpoint, or None if it has none."""
    path = folder / TOKENIZER_FILE
    return Tokenizer.load(path) if path.is_file() else None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; is this a checkpoint folder?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
