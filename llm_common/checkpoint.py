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
import re
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
ASIDE = ".old"  # with a leading dot, the name of a checkpoint that is about to be replaced
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
        aside = run / f".{folder.name}{ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside)
    else:
        os.rename(partial, folder)
    sync(run)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. One that had stepped aside when a save was cut off is put back."""
    folders = sorted(run.iterdir()) if run.is_dir() else []
    for aside in folders:
        if aside.name.endswith(ASIDE) and not (original := run / aside.name[1 : -len(ASIDE)]).exists():
            os.rename(aside, original)
            folders.append(original)
    steps = [x for x in folders if re.fullmatch(r"step-\d{8,}", x.name) and (x / STATE_FILE).is_file()]
    return max(steps, key=lambda folder: int(folder.name[5:]), default=None)


def load_config(folder: Path) -> ModelConfig:
    """The model config of a checkpoint or of a Hugging Face folder."""
    return ModelConfig.from_file(folder / CONFIG_FILE)


def load_weights(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights alone: of a training checkpoint, whose sha256 are checked, or of any folder that has the files
    config.json and model.safetensors.
    """
    if (folder / STATE_FILE).is_file():
        _read_state(folder, (CONFIG_FILE, MODEL_FILE))
    return _read_weights(folder)


def _read_weights(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    cfg = load_config(folder)
    weights = read_tensors(folder / MODEL_FILE)
    check_tensors(cfg, weights, str(folder / MODEL_FILE))
    return cfg, weights


def load_checkpoint(folder: Path, cfg: ModelConfig | None = None) -> tuple[ModelConfig, TrainingState, dict[str, Any]]:
    """Config, training state and settings of a checkpoint, after checking every file's size and sha256.

    Raises UserError, naming the file or the field, if the checkpoint is incomplete, damaged, of a newer format, or, with
    `cfg` given, of another model.
    """
    content = _read_state(folder)
    saved_cfg, weights = _read_weights(folder)
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


def _read_state(folder: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """The contents of state.json, after checking size and sha256 of all files that it lists (or of `only` some)."""
    content = _read_json(folder / STATE_FILE)
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UserError(f"{folder}: checkpoint format {version!r}, but this version reads {FORMAT}")
    missing = {"step", "adam_count", "files", "settings"} - set(content)
    if missing:
        raise UserError(f"{folder / STATE_FILE}: {min(missing)!r} is missing; use an earlier checkpoint")
    for name, expected in content["files"].items():
        path = folder / name
        if only and name not in only:
            continue
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is incomplete, use an earlier one")
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: damaged (its sha256 is not the recorded one); use an earlier checkpoint")
    return content


def run_settings(
    train: TrainConfig, opt: OptimizerConfig, dataset: TokenDataset, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """What a checkpoint records of its run, as JSON. Raises UserError if the dataset was made for other settings."""
    data = dataset.fingerprint()
    for field in ("seq_len", "batch_size", "seed"):
        if data.get(field, getattr(train, field)) != getattr(train, field):
            raise UserError(
                f"the dataset has {field} = {data[field]}, but TrainConfig.{field} = {getattr(train, field)}"
            )
    if tokenizer is not None:
        data["tokenizer"] = tokenizer.fingerprint()
    return {"train": asdict(train), "optimizer": asdict(opt), "data": data}


def check_resumable(folder: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UserError, naming every differing field, unless a run may go on from the checkpoint `folder`.

    The framework, the attention backend and the patience with skipped steps may change: they do not decide the results.
    Everything else would silently be another run.
    """
    differing = []
    for part, values in asked.items():
        for key, value in values.items():
            old = saved.get(part, {}).get(key)
            if old != value and key not in ("attention_backend", "max_skipped_steps"):
                differing.append(f"{part}.{key} = {old!r} here, {value!r} asked for")
    if differing:
        raise UserError(f"{folder}: the run was started with other settings: {'; '.join(differing)}; use another --out")


def load_resumable(
    run: Path, cfg: ModelConfig, settings: dict[str, Any]
) -> tuple[Path, TrainingState] | tuple[None, None]:
    """The newest checkpoint of a run and its state, after `check_resumable`; a new run has neither."""
    folder = latest_checkpoint(run)
    if folder is None:
        return None, None
    _, state, saved_settings = load_checkpoint(folder, cfg)
    check_resumable(folder, saved_settings, settings)
    return folder, state


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
