"""Checkpoint folders, in NumPy: what `jax_llm.engine.checkpoint` and `torch_llm.engine.checkpoint` both write and both
read.

    step-00001000/
      config.json            the model, as transformers reads it
      model.safetensors      master weights under their canonical names
      optimizer.safetensors  mu.<name> and nu.<name>
                             (large ones, and those of several hosts, in shards with an index, as transformers has them)
      bpe.json, tokenizer.json, ...   the tokenizer, if the run has one, as this program and as transformers load it
      state.json             counters, seed, settings, sha256 of every other file and of its own content; written last,
                             as the commit mark

The folder is written under a temporary name and renamed when it is complete, so an interrupted save leaves the previous
checkpoint as it was. There is no pickle anywhere. The folder is also one that transformers loads.
"""

import itertools
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import (
    Damaged,
    UserError,
    has_its_checksum,
    json_bytes,
    notice,
    read_json,
    sha256_of,
    with_checksum,
)
from llm_common.files.model_folder import CONFIG_FILE, check_model_folder, open_weights
from llm_common.files.tensor_files import (
    MODEL_FILE,
    TensorFiles,
    check_finite,
    check_plain_file,
    open_model_files,
    plan_shards,
    shard_index,
    sync,
    write_synced,
    write_tensors,
)
from llm_common.run.hosts import ONE_HOST, Hosts
from llm_common.run.settings import COMPARED, check_resumable, differences, trained_ends, well_formed_settings
from llm_common.tensors import ReadOnDemand, Tensors, check_tensors, tensor_shapes
from llm_common.text.hf_tokenizer import FILES, AnyTokenizer, companions, token_ids
from llm_common.text.tokenizer import FILE_NAME
from llm_common.text.tokenizer_folder import TokenizerFolder

FORMAT = 2  # 1, which is read too, has no checksum of state.json itself
READ_FORMATS = (1, 2)
ASIDE = ".old"  # with a leading dot, the name of a checkpoint that is about to be replaced
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"


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

    Several hosts write to one folder, which all of them must see, each its share of the files; none holds more than a
    file and a tensor in memory. Raises UserError, on all hosts, if one cannot write; what was saved before is not
    touched.
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
        hosts.first(written(lambda: _commit(partial, folder, settings)))
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
            f"{folder}: cannot be written ({error.strerror or error}); it needs {need / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} "
            "are free. Make room and start again; "
            f"{'nothing was saved before' if newest is None else f'{newest} is complete'}"
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
                check_finite(name, tensor)
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
            write_synced(index, json_bytes(shard_index(plan, sizes)))
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
    ends = trained_ends(settings)
    config = (
        cfg.to_hf() | ({} if tokenizer is None else token_ids(tokenizer, ends)) | {"dtype": dtype, "torch_dtype": dtype}
    )
    small = {CONFIG_FILE: json_bytes(config)} | (companions(tokenizer, ends) if tokenizer is not None else {})
    for name, data in small.items():
        write_synced(folder / name, data)
        files[name] = _entry(folder / name)
    content = {
        "format": FORMAT,
        "step": state.step,
        "adam_count": state.adam_count,
        "files": dict(sorted(files.items())),
        "settings": settings,
    }
    write_synced(folder / STATE_FILE, json_bytes(with_checksum(content)))
    sync(folder)


def _commit(partial: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Rename a complete folder into its place."""
    run = folder.parent
    if os.path.lexists(folder) and not _is_of_run(folder, settings):  # somebody else's: kept, under another name
        other = next(
            x for i in itertools.count(1) if not os.path.lexists(x := run / f"{folder.name}.not-of-this-run-{i}")
        )
        os.rename(folder, other)
        notice(f"{folder} was there and is no checkpoint of this run; it is now {other.name}")
    if folder.exists():  # the same step saved again: the old one steps aside and goes when the new one is in place
        aside = run / f".{folder.name}{ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(partial, folder)
    sync(run)


def _is_of_run(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder is a whole checkpoint of the run with these settings, and so may be replaced or deleted."""
    try:
        saved = _read_mark(folder)["settings"]
    except UserError:
        return False
    return not differences(saved, {part: settings[part] for part in COMPARED if part in settings and part != "initial"})


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first. One that had stepped aside when a save was cut off is put
    back.
    """
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


def prune_checkpoints(run: Path, keep_last: int, keep_best: int, settings: dict[str, Any] | None = None) -> list[Path]:
    """Delete all checkpoints but the newest `keep_last` and the `keep_best` with the lowest held-out loss; returns
    those.

    keep_last 0 keeps all. A checkpoint whose loss is not known is never a best one. settings: those of the run; what is
    not a whole checkpoint of it is not deleted. What a cut-off save or deletion left behind goes too.
    """
    found = checkpoints(run)  # which puts back what had only stepped aside
    for leftover in [path for end in (".partial", ".deleted", ASIDE) for path in run.glob(f".step-*{end}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    losses = {folder: loss for folder in found if (loss := held_out_loss(folder)) is not None}
    best = sorted(losses, key=lambda folder: losses[folder])[:keep_best]
    deleted = [folder for folder in found[: -keep_last or None] if folder not in best] if keep_last else []
    deleted = [folder for folder in deleted if settings is None or _is_of_run(folder, settings)]
    for folder in deleted:
        aside = run / f".{folder.name}.deleted"  # at once no checkpoint any more, however long deleting takes
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return deleted


def held_out_loss(folder: Path) -> float | None:
    """The loss that a checkpoint recorded of itself, or None: it was not measured, is not finite, or its record is
    damaged.
    """
    try:
        loss = _read_mark(folder)["settings"]["evaluation"]["loss"]
    except (UserError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, (int, float)) and not isinstance(loss, bool) and math.isfinite(loss) else None


def load_weights(folder: Path) -> tuple[ModelConfig, TensorFiles]:
    """Config and weights alone, read when they are asked for: of a training checkpoint, whose sha256 are checked, those
    of its tokenizer among them, or of a Hugging Face folder, in one file or in shards. Raises UserError, which says
    what it is, for anything else.
    """
    if (folder / STATE_FILE).is_file():
        return open_weights(folder, _read_state(folder, optimizer=False)["files"])
    check_model_folder(folder)
    return open_weights(folder)


def load_checkpoint(
    folder: Path, cfg: ModelConfig | None = None, verify: bool = True
) -> tuple[ModelConfig, TrainingState, dict[str, Any]]:
    """Config, training state and settings of a checkpoint, after checking every file's size and, to `verify`, sha256.

    Raises UserError, naming the file or the field, if the checkpoint is incomplete, damaged, of a newer format, or,
    with `cfg` given, of another model.
    """
    content = _read_state(folder, verify=verify)
    saved_cfg, weights = open_weights(folder, content["files"])
    if cfg is not None and cfg != saved_cfg:
        saved, asked = asdict(saved_cfg), asdict(cfg)
        differing = [
            f"{key} = {saved[key]!r} here, {asked[key]!r} asked for" for key in saved if saved[key] != asked[key]
        ]
        raise UserError(f"{folder}: checkpoint of another model: {'; '.join(differing)}")
    moments = []
    for label in ("mu", "nu"):
        moment = open_model_files(folder, OPTIMIZER_FILE, content["files"])
        entries = moment.entries.items()
        moment.entries = {name[3:]: entry for name, entry in entries if name.startswith(label + ".")}
        check_tensors(saved_cfg, moment, f"{folder / OPTIMIZER_FILE} ({label})")
        moments.append(moment)
    mu, nu = moments
    state = TrainingState(weights, mu, nu, content["step"], content["adam_count"])
    return saved_cfg, state, content["settings"]


def stops_of(folder: Path) -> list[int]:
    """The ids at which text of a model is to end, as its folder says: the configs, and what its data ended with."""
    found = TokenizerFolder(folder).ids_of("eos_token_id") + trained_ends(read_settings(folder))
    return list(dict.fromkeys(found))


def read_settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint records of its run; nothing for a folder of another kind."""
    return _read_mark(folder)["settings"] if (folder / STATE_FILE).is_file() else {}


def _read_mark(folder: Path) -> dict[str, Any]:
    """The contents of state.json, checked by themselves: nothing of what it lists is read. Raises UserError."""
    path = folder / STATE_FILE
    content = read_json(path, "is this a checkpoint folder?")
    version = content.get("format") if isinstance(content, dict) else None
    if version not in READ_FORMATS:
        raise UserError(f"{folder}: checkpoint format {version!r}, but this version reads {READ_FORMATS[-1]} and older")
    if version > 1 and not has_its_checksum(content):
        raise Damaged(f"{path}: damaged (its checksum is not that of its content); use an earlier checkpoint")
    missing = {"step", "adam_count", "files", "settings"} - set(content)
    if missing:
        raise Damaged(f"{path}: {min(missing)!r} is missing; use an earlier checkpoint")
    counters = [content["step"], content["adam_count"]]
    well_formed = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**53 for x in counters)
    well_formed = well_formed and counters[1] <= counters[0]
    if not (well_formed and isinstance(content["files"], dict) and well_formed_settings(content["settings"])):
        raise Damaged(f"{path}: damaged; use an earlier checkpoint")
    named = re.fullmatch(r"step-(\d{8,})", folder.name)
    if named and int(named[1]) != content["step"]:
        raise Damaged(
            f"{folder}: is step {content['step']}, as its state.json says, under another name; "
            f"name it step-{content['step']:08d}, or use an earlier checkpoint"
        )
    return content


def _read_state(folder: Path, optimizer: bool = True, verify: bool = True) -> dict[str, Any]:
    """The contents of state.json, after checking size and sha256 of all files that it lists, the optimizer's perhaps
    left out, and that nothing is there beside them that would be taken for one of them.
    """
    content = _read_mark(folder)
    files = content["files"]
    needed = (CONFIG_FILE, *(name if name in files else f"{name}.index.json" for name in (MODEL_FILE, OPTIMIZER_FILE)))
    for name in set(needed) - set(files):
        raise Damaged(
            f"{folder / STATE_FILE}: does not list {name.removesuffix('.index.json')}; use an earlier checkpoint"
        )
    for name, expected in files.items():
        if name != os.path.basename(name) or not isinstance(expected, dict) or not {"size", "sha256"} <= set(expected):
            raise Damaged(f"{folder / STATE_FILE}: {name!r} is not the entry of a file of this checkpoint")
        path = folder / name
        if not optimizer and name.startswith(OPTIMIZER_FILE.removesuffix(".safetensors")):
            continue
        if not path.is_file():
            raise Damaged(f"{path}: missing; the checkpoint is incomplete, use an earlier one")
        if path.is_symlink():
            raise Damaged(f"{path}: a link; a checkpoint holds its own files")
        check_plain_file(path)
        if path.stat().st_size != expected["size"] or (verify and sha256_of(path) != expected["sha256"]):
            raise Damaged(f"{path}: damaged (its sha256 is not the recorded one); use an earlier checkpoint")
    for name in (FILE_NAME, *FILES):
        if name not in files and (folder / name).exists():
            raise Damaged(f"{folder / name}: no file of this checkpoint, but one that would count; remove it")
    return content


def load_resumable(
    run: Path, cfg: ModelConfig, settings: dict[str, Any]
) -> tuple[Path, TrainingState, dict[str, Any]] | tuple[None, None, dict[str, Any]]:
    """The newest checkpoint of a run, its state and its settings, after `check_resumable`; a new run has none."""
    folder = latest_checkpoint(run)
    if folder is None:
        return None, None, {}
    try:
        _, state, saved_settings = load_checkpoint(folder, cfg)
    except UserError as error:
        before = [path.name for path in checkpoints(run) if path != folder]
        hint = f"; to go on from {before[-1]}, move {folder.name} out of the run's folder" if before else ""
        raise type(error)(f"{error}{hint if isinstance(error, Damaged) else ''}") from None
    check_resumable(folder, saved_settings, settings)
    return folder, state, saved_settings


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}
