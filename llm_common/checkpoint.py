"""Checkpoint folders, in NumPy: what `jax_llm.checkpoint` and `torch_llm.checkpoint` both write and both read.

    step-00001000/
      config.json            the model, as transformers reads it
      model.safetensors      master weights under their canonical names
      optimizer.safetensors  mu.<name> and nu.<name>
                             (large ones, and those of several hosts, in shards with an index, as transformers has them)
      bpe.json, tokenizer.json, ...   the tokenizer, if the run has one, as this program and as transformers load it
      state.json             counters, seed, settings, sha256 of every other file; written last, as the commit mark

The folder is written under a temporary name and renamed when it is complete, so an interrupted save leaves the previous
checkpoint as it was. There is no pickle anywhere. The folder is also one that transformers loads.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig
from llm_common.data import Dataset
from llm_common.errors import UserError, read_json
from llm_common.hf_tokenizer import AnyTokenizer, companions, token_ids
from llm_common.hosts import ONE_HOST, Hosts
from llm_common.tensor_files import (
    MODEL_FILE,
    TensorFiles,
    check_plain_file,
    open_model_files,
    plan_shards,
    shard_index,
    sync,
    write_tensors,
)
from llm_common.tensors import ReadOnDemand, Tensors, check_tensors, tensor_shapes

FORMAT = 1
ASIDE = ".old"  # with a leading dot, the name of a checkpoint that is about to be replaced
CONFIG_FILE, OPTIMIZER_FILE, STATE_FILE = "config.json", "optimizer.safetensors", "state.json"
# Settings of TrainConfig that change no result, or only its rounding: a run may go on with others.
MAY_CHANGE = (
    *("attention_backend", "max_skipped_steps", "gradient_accumulation_steps", "loss_chunks"),
    *("remat", "compile", "scan_layers", "deterministic"),
)


@dataclass
class TrainingState:
    """Everything a run needs to go on, in either framework. Arrays are canonical tensors in the master dtype.

    Those of a loaded checkpoint are read when they are asked for.
    """

    weights: Tensors
    mu: Tensors
    nu: Tensors
    step: int  # steps made, which decides the data and the learning rate
    adam_count: int  # updates made: fewer than `step` if some were skipped


def save_checkpoint(
    run: Path,
    cfg: ModelConfig,
    state: TrainingState,
    settings: dict[str, Any],
    tokenizer: AnyTokenizer | None = None,
    hosts: Hosts = ONE_HOST,
) -> Path:
    """Write `run/step-XXXXXXXX`; returns it. `settings` is any JSON: hyper-parameters, data fingerprint, framework.

    Several hosts write to one folder, which all of them must see, each its share of the files; none holds more than a file and
    a tensor in memory. Raises UserError, on all hosts, if one cannot write; what was saved before is not touched.
    """
    folder = run / f"step-{state.step:08d}"
    partial = run / f".{folder.name}.partial"
    dtype = next(iter(state.weights.values())).dtype

    def written(action: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: _written(action, folder, 3 * cfg.num_parameters() * dtype.itemsize)

    try:
        hosts.first(written(lambda: _make_empty(partial)))
        shares = hosts.together(written(lambda: _write_tensors(partial, cfg, state, dtype, hosts)))
        files = {name: entry for share in shares for name, entry in share.items()}
        hosts.first(written(lambda: _write_rest(partial, cfg, state, settings, tokenizer, dtype.name, files)))
        hosts.first(written(lambda: _commit(partial, folder)))
    except UserError:
        if hosts.index == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _written(action: Callable[[], Any], folder: Path, need: int) -> Any:
    """The result of an action that writes; where the system refuses it, one error that says what is missing."""
    run = folder.parent
    try:
        return action()
    except OSError as error:
        newest = latest_checkpoint(run)
        free = shutil.disk_usage(run).free if run.is_dir() else 0
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); it needs {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} "
            f"are free. Make room and start again; {'nothing was saved before' if newest is None else f'{newest} is complete'}"
        ) from None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(
    folder: Path, cfg: ModelConfig, state: TrainingState, dtype: np.dtype, hosts: Hosts
) -> dict[str, dict[str, Any]]:
    """Write this host's share of the files of weights and moments; returns size and sha256 of each.

    Every host asks for every tensor, which may be cut over all of them, and keeps those of its own files.
    """
    shapes, failed, entries = tensor_shapes(cfg), None, {}
    moments = {"mu": state.mu, "nu": state.nu}
    optimizer = ReadOnDemand(
        [f"{label}.{name}" for label in moments for name in shapes], lambda name: moments[name[:2]][name[3:]]
    )
    for file, tensors in ((MODEL_FILE, state.weights), (OPTIMIZER_FILE, optimizer)):
        sizes = {
            name: math.prod(shapes[name.removeprefix("mu.").removeprefix("nu.")]) * dtype.itemsize for name in tensors
        }
        plan = plan_shards(file, sizes, hosts.count)
        for i, (shard, names) in enumerate(plan.items()):
            kept = {}
            for name in names:
                tensor = tensors[name]
                if i % hosts.count == hosts.index:
                    kept[name] = tensor
            try:
                if kept and failed is None:
                    write_tensors(folder / shard, kept)
                    entries[shard] = _entry(folder / shard)
            except OSError as error:
                failed = error  # raised at the end: the other hosts still ask for what is cut over this one too
        if len(plan) > 1 and hosts.index == 0:
            index = folder / f"{file}.index.json"
            _write(index, _json(shard_index(plan, sizes)))
            entries[index.name] = _entry(index)
    if failed is not None:
        raise failed
    return entries


def _write_rest(
    folder: Path,
    cfg: ModelConfig,
    state: TrainingState,
    settings: dict[str, Any],
    tokenizer: AnyTokenizer | None,
    dtype: str,
    files: dict[str, dict[str, Any]],
) -> None:
    """Write the config, the tokenizer and, as the commit mark, state.json, which lists `files` and these."""
    config = cfg.to_hf() | ({} if tokenizer is None else token_ids(tokenizer)) | {"dtype": dtype, "torch_dtype": dtype}
    small = {CONFIG_FILE: _json(config)} | (companions(tokenizer) if tokenizer is not None else {})
    for name, data in small.items():
        _write(folder / name, data)
        files[name] = _entry(folder / name)
    content = {
        "format": FORMAT,
        "step": state.step,
        "adam_count": state.adam_count,
        "files": dict(sorted(files.items())),
        "settings": settings,
    }
    _write(folder / STATE_FILE, _json(content))
    sync(folder)


def _commit(partial: Path, folder: Path) -> None:
    """Rename a complete folder into its place."""
    run = folder.parent
    if folder.exists():  # the same step saved again: the old one steps aside and goes when the new one is in place
        aside = run / f".{folder.name}{ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside)
    else:
        os.rename(partial, folder)
    sync(run)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first. One that had stepped aside when a save was cut off is put back."""
    folders = sorted(run.iterdir()) if run.is_dir() else []
    for aside in folders:
        if aside.name.endswith(ASIDE) and not (original := run / aside.name[1 : -len(ASIDE)]).exists():
            os.rename(aside, original)
            folders.append(original)
    steps = [x for x in folders if re.fullmatch(r"step-\d{8,}", x.name) and (x / STATE_FILE).is_file()]
    return sorted(steps, key=lambda folder: int(folder.name[5:]))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(checkpoints(run), key=lambda folder: int(folder.name[5:]), default=None)


def prune_checkpoints(run: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Delete all checkpoints but the newest `keep_last` and the `keep_best` with the lowest held-out loss; returns those.

    keep_last 0 keeps all. What a cut-off save or deletion left behind goes too.
    """
    found = checkpoints(run)  # which puts back what had only stepped aside
    for leftover in [path for end in (".partial", ".deleted", ASIDE) for path in run.glob(f".step-*{end}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    losses = {folder: loss for folder in found if (loss := held_out_loss(folder)) is not None}
    best = sorted(losses, key=lambda folder: losses[folder])[:keep_best]
    deleted = [folder for folder in found[: -keep_last or None] if folder not in best] if keep_last else []
    for folder in deleted:
        aside = run / f".{folder.name}.deleted"  # at once no checkpoint any more, however long deleting takes
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return deleted


def held_out_loss(folder: Path) -> float | None:
    """The loss that a checkpoint recorded of itself, or None."""
    try:
        return read_json(folder / STATE_FILE)["settings"]["evaluation"]["loss"]
    except (UserError, KeyError, TypeError):
        return None


def load_config(folder: Path) -> ModelConfig:
    """The model config of a checkpoint or of a Hugging Face folder."""
    return ModelConfig.from_file(folder / CONFIG_FILE)


def load_weights(folder: Path) -> tuple[ModelConfig, TensorFiles]:
    """Config and weights alone, read when they are asked for: of a training checkpoint, whose sha256 are checked, or of a
    Hugging Face folder, in one file or in shards.
    """
    if (folder / STATE_FILE).is_file():
        _read_state(folder, "model")
    return _open_weights(folder)


def _open_weights(folder: Path) -> tuple[ModelConfig, TensorFiles]:
    cfg = load_config(folder)
    weights = open_model_files(folder)
    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:
        weights.without(name)  # old files hold this table, which follows from the config
    if cfg.tie_word_embeddings and "lm_head.weight" in weights and "model.embed_tokens.weight" in weights:
        head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
        if not np.array_equal(head, embedding):
            raise UserError(f"{folder}: lm_head.weight differs from the embedding, but the config ties the two")
        weights.without("lm_head.weight")
    check_tensors(cfg, weights, str(folder))
    return cfg, weights


def load_checkpoint(
    folder: Path, cfg: ModelConfig | None = None, verify: bool = True
) -> tuple[ModelConfig, TrainingState, dict[str, Any]]:
    """Config, training state and settings of a checkpoint, after checking every file's size and, to `verify`, sha256.

    Raises UserError, naming the file or the field, if the checkpoint is incomplete, damaged, of a newer format, or, with
    `cfg` given, of another model.
    """
    content = _read_state(folder, verify=verify)
    saved_cfg, weights = _open_weights(folder)
    if cfg is not None and cfg != saved_cfg:
        saved, asked = asdict(saved_cfg), asdict(cfg)
        differing = [
            f"{key} = {saved[key]!r} here, {asked[key]!r} asked for" for key in saved if saved[key] != asked[key]
        ]
        raise UserError(f"{folder}: checkpoint of another model: {'; '.join(differing)}")
    moments = []
    for label in ("mu", "nu"):
        moment = open_model_files(folder, OPTIMIZER_FILE)
        entries = moment.entries.items()
        moment.entries = {name[3:]: entry for name, entry in entries if name.startswith(label + ".")}
        check_tensors(saved_cfg, moment, f"{folder / OPTIMIZER_FILE} ({label})")
        moments.append(moment)
    mu, nu = moments
    state = TrainingState(weights, mu, nu, content["step"], content["adam_count"])
    return saved_cfg, state, content["settings"]


def _read_state(folder: Path, only: str = "", verify: bool = True) -> dict[str, Any]:
    """The contents of state.json, after checking size and sha256 of all files that it lists (or of config and those that begin
    with `only`)."""
    content = read_json(folder / STATE_FILE, "is this a checkpoint folder?")
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UserError(f"{folder}: checkpoint format {version!r}, but this version reads {FORMAT}")
    missing = {"step", "adam_count", "files", "settings"} - set(content)
    if missing:
        raise UserError(f"{folder / STATE_FILE}: {min(missing)!r} is missing; use an earlier checkpoint")
    counters = [content["step"], content["adam_count"]]
    files, settings = content["files"], content["settings"]
    well_formed = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in counters)
    if not (well_formed and isinstance(files, dict) and isinstance(settings, dict)):
        raise UserError(f"{folder / STATE_FILE}: damaged; use an earlier checkpoint")
    needed = (CONFIG_FILE, *(name if name in files else f"{name}.index.json" for name in (MODEL_FILE, OPTIMIZER_FILE)))
    for name in set(needed) - set(files):
        raise UserError(
            f"{folder / STATE_FILE}: does not list {name.removesuffix('.index.json')}; use an earlier checkpoint"
        )
    for name, expected in files.items():
        if name != os.path.basename(name) or not isinstance(expected, dict) or not {"size", "sha256"} <= set(expected):
            raise UserError(f"{folder / STATE_FILE}: {name!r} is not the entry of a file of this checkpoint")
        path = folder / name
        if only and not name.startswith((CONFIG_FILE, only)):
            continue
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is incomplete, use an earlier one")
        if path.is_symlink():
            raise UserError(f"{path}: a link; a checkpoint holds its own files")
        check_plain_file(path)
        if path.stat().st_size != expected["size"] or (verify and _sha256(path) != expected["sha256"]):
            raise UserError(f"{path}: damaged (its sha256 is not the recorded one); use an earlier checkpoint")
    return content


def run_settings(
    train: TrainConfig, opt: OptimizerConfig, dataset: Dataset, tokenizer: AnyTokenizer | None = None
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

    The framework and what `MAY_CHANGE` lists may differ; everything else would silently be another run.
    """
    differing = []
    for part, values in asked.items():
        for key, value in values.items():
            old = saved.get(part, {}).get(key)
            if old != value and key not in MAY_CHANGE:
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
    try:
        _, state, saved_settings = load_checkpoint(folder, cfg)
    except UserError as error:
        before = [path.name for path in checkpoints(run) if path != folder]
        hint = f"; to go on from {before[-1]}, move {folder.name} out of the run's folder" if before else ""
        raise UserError(f"{error}{hint if 'use an earlier' in str(error) else ''}") from None
    check_resumable(folder, saved_settings, settings)
    return folder, state


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
