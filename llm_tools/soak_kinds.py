"""What scripts/soak.py kills: work that goes on until then, and what must hold after it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import OptimizerConfig, Recipe, RunConfig, TrainConfig, preset
from llm_common.data.answers import load_examples, write_examples
from llm_common.data.datasets import check_data, open_tokens, write_tokens
from llm_common.data.evaluation import Evaluation
from llm_common.data.shards import prepare
from llm_common.errors import UserError
from llm_common.files.export import export
from llm_common.run.checkpoint import (
    TrainingState,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from llm_common.run.folder import Run
from llm_common.run.log import read_log
from llm_common.tensors import tensor_shapes
from llm_common.text.tokenizer import Tokenizer

CFG, TOKENIZER = preset("tiny"), Tokenizer([])
SMALL = {name: shape for name, shape in tensor_shapes(CFG).items()}  # noqa: C416
SPAN = {"run": 0.08, "save": 0.04, "export": 0.03, "tokens": 0.01, "examples": 0.01, "shards": 2.5, "dcp": 0.08}
RARE = {"shards": 50}  # kinds whose start takes long: one in so many kills


def state_of(step: int) -> TrainingState:
    """A training state in which every number is the step's."""
    tensors = lambda: {name: np.full(shape, step, np.float32) for name, shape in SMALL.items()}
    return TrainingState(tensors(), tensors(), tensors(), step, step)


class Numbers:
    """A dataset that nobody reads."""

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("the soak's model of numbers has no batches")

    def fingerprint(self) -> dict[str, Any]:
        return {"tokens": 1}


@dataclass
class Kind:
    """Something that is killed. work(folder) goes on until then; check(folder) raises AssertionError for what is lost
    or wrong.
    """

    work: Callable[[Path], None]
    check: Callable[[Path], None]


# --- what is killed, and what must hold after it


def work_run(folder: Path) -> None:
    """Train from the newest checkpoint on, saving every second step; evaluate, prune and log as a run does."""
    evaluation = Evaluation(np.arange(9), 4, 2)
    config = RunConfig(save_every=2, keep_last=2, keep_best=1)
    recipe = Recipe(CFG, TrainConfig(seq_len=4), OptimizerConfig(total_steps=10**6))
    run = Run(folder / "run", recipe, Numbers(), "jax", evaluation=evaluation, config=config)
    with run:
        saved = run.resume()
        step = 0 if saved is None else saved.step
        while True:
            step += 1
            metrics = {"loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "skipped": False}
            run.after_step(
                step, metrics, lambda step=step: state_of(step), lambda _, step=step: (8.0 * abs(step - 20), 8)
            )


def check_run(folder: Path) -> None:
    found = checkpoints(folder / "run")
    for path in found:
        check_state(path)
    before = folder / "newest"
    newest = int(found[-1].name[5:]) if found else 0
    assert newest >= int(before.read_text() if before.is_file() else 0), "a checkpoint that was there is gone"
    before.write_text(str(newest))
    log = folder / "run" / "log.jsonl"
    steps = [row["step"] for row in read_log(log) if "event" not in row] if log.is_file() else []
    assert steps == list(range(1, len(steps) + 1)), "the log has not every step once"
    assert len(steps) >= newest, "the log lacks steps that are saved"


def check_state(path: Path) -> None:
    _, state, _ = load_checkpoint(path, CFG)
    for part in (state.weights, state.mu, state.nu):
        assert all((x == state.step).all() for x in part.values()), f"{path}: not what was saved"


def work_save(folder: Path) -> None:
    """Save, and save the same step again, and prune."""
    last = latest_checkpoint(folder / "run")
    step = 0 if last is None else int(last.name[5:])
    while True:
        step += 1
        save_checkpoint(folder / "run", CFG, state_of(step), {}, TOKENIZER)
        save_checkpoint(folder / "run", CFG, state_of(step), {"again": True}, TOKENIZER)
        prune_checkpoints(folder / "run", 2, 0)


def check_save(folder: Path) -> None:
    found = checkpoints(folder / "run")
    for path in found:
        check_state(path)
    newest, before = int(found[-1].name[5:]) if found else 0, folder / "newest"
    assert newest >= int(before.read_text() if before.is_file() else 0), "a checkpoint that was there is gone"
    before.write_text(str(newest))


def work_export(folder: Path) -> None:
    number = max((int(path.name[6:]) for path in folder.glob("model-*")), default=0)
    while True:
        number += 1
        export(folder / f"model-{number}", CFG, state_of(number).weights, TOKENIZER, shard_bytes=40_000)
        if number > 3 and (folder / f"model-{number - 3}").exists():
            (folder / f"model-{number - 3}").rename(folder / f"old-{number - 3}")
            shutil.rmtree(folder / f"old-{number - 3}")


def check_export(folder: Path) -> None:
    for path in folder.glob("model-*"):
        _, weights = load_weights(path)
        assert all((x == int(path.name[6:])).all() for x in weights.values()), f"{path}: not what was exported"


def work_tokens(folder: Path) -> None:
    while True:
        for text in ("a" * 50, "b" * 900):
            write_tokens(folder / "t.npy", [text] * 20, TOKENIZER)


def check_tokens(folder: Path) -> None:
    if not (folder / "t.npy").is_file() and not (folder / "was").exists():
        return
    (folder / "was").write_text("")  # from now on a whole one must be there
    description = check_data(folder / "t.npy", TOKENIZER)
    assert len(open_tokens(folder / "t.npy")) == description["tokens"], "not what its description says"


def work_examples(folder: Path) -> None:
    while True:
        for n in (3, 400):
            write_examples(folder / "e.npz", [([1, 2], [3] * n)] * n, TOKENIZER)


def check_examples(folder: Path) -> None:
    if not (folder / "e.npz").is_file() and not (folder / "was").exists():
        return
    (folder / "was").write_text("")
    description = check_data(folder / "e.npz", TOKENIZER)
    assert len(load_examples(folder / "e.npz")[2]) == description["examples"], "not what its description says"


DOCUMENTS = [f"document {i} " * (i % 40 + 1) for i in range(400)]


def work_shards(folder: Path) -> None:
    """Prepare one folder of shards after the other; one that was begun goes on."""
    TOKENIZER.save(folder / "bpe.json")
    number = max((int(path.name[5:]) for path in folder.glob("data-*")), default=1)
    while True:
        if not (folder / f"data-{number}" / "validation" / "manifest.json").is_file():
            prepare(DOCUMENTS, folder / f"data-{number}", folder / "bpe.json", 0.1, 2, part_size=3000)
        number += 1


def check_shards(folder: Path) -> None:
    for data in folder.glob("data-*"):
        if (data / "train" / "manifest.json").is_file():
            assert check_data(data / "train")["documents"] > len(DOCUMENTS) / 2, "not what was prepared"
            continue
        try:
            open_tokens(data)
        except UserError:
            continue
        raise AssertionError("data without a manifest was read")


def work_dcp(folder: Path) -> None:
    """Convert to torch's format and back, as one-model convert-checkpoint does."""
    import torch

    from torch_llm.engine import foreign_checkpoint

    torch.set_num_threads(1)
    saved = save_checkpoint(folder / "run", CFG, state_of(1), {}, TOKENIZER)
    _, state, _ = load_checkpoint(saved)
    tree = {f"weights.{name}": np.array(x) for name, x in state.weights.items()}
    while True:
        partial = folder / ".dcp.partial"
        shutil.rmtree(partial, ignore_errors=True)
        foreign_checkpoint.write(partial, tree)
        if (folder / "dcp").exists():
            found = foreign_checkpoint.read(folder / "dcp", tree)
            save_checkpoint(
                folder / "again", CFG, TrainingState({k[8:]: x for k, x in found.items()}, *state_moments(), 1, 1), {}
            )
        else:
            partial.rename(folder / "dcp")


def state_moments() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    state = state_of(1)
    return dict(state.mu), dict(state.nu)


def check_dcp(folder: Path) -> None:
    for name in ("run", "again"):
        for path in checkpoints(folder / name):
            check_state(path)


KINDS = {
    "run": Kind(work_run, check_run),
    "save": Kind(work_save, check_save),
    "export": Kind(work_export, check_export),
    "tokens": Kind(work_tokens, check_tokens),
    "examples": Kind(work_examples, check_examples),
    "shards": Kind(work_shards, check_shards),
    "dcp": Kind(work_dcp, check_dcp),
}
