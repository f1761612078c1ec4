"""A checkpoint as Orbax or torch's distributed format has it, and back."""

from pathlib import Path

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import (
    UserError,
    has_its_checksum,
    notice,
    read_json,
    sha256_of,
)
from llm_common.files.tensor_files import check_finite
from llm_common.run.checkpoint import TrainingState
from llm_common.tensors import check_tensors, tensor_shapes

PARTS, COUNTERS = ("weights", "mu", "nu"), ("step", "adam_count")
CHECKSUMS = "checksums.json"


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def check_files(folder: Path) -> None:
    """Compare a folder with its checksums. Raises UserError, naming the file, if one is not as it was written."""
    if not (folder / CHECKSUMS).is_file():
        notice(f"{folder} has no {CHECKSUMS}: it is checked as far as its own format goes")
        return
    content = read_json(folder / CHECKSUMS)
    if not isinstance(content, dict) or not has_its_checksum(content) or not isinstance(content.get("files"), dict):
        raise UserError(f"{folder / CHECKSUMS}: damaged; convert the checkpoint again")
    found = file_hashes(folder)
    for name in sorted(set(found) | set(content["files"])):
        if name not in found:
            raise UserError(f"{folder / name}: missing; convert the checkpoint again")
        if found[name] != content["files"].get(name):
            raise UserError(
                f"{folder / name}: damaged (its sha256 is not the recorded one); convert the checkpoint again"
            )


def flat(state: TrainingState) -> dict[str, np.ndarray]:
    """A training state as one flat dict of arrays."""
    tree = {f"{part}.{name}": np.array(x) for part in PARTS for name, x in getattr(state, part).items()}
    return tree | {name: np.array(getattr(state, name), np.int64) for name in COUNTERS}


def to_state(cfg: ModelConfig, source: str, tree: dict[str, np.ndarray]) -> TrainingState:
    """The inverse of `flat`. Raises UserError for a tensor that is missing, has another shape, or cannot be what it is
    called.
    """
    parts = []
    for part in PARTS:
        tensors = {name: tree[f"{part}.{name}"] for name in tensor_shapes(cfg) if f"{part}.{name}" in tree}
        check_tensors(cfg, tensors, f"{source}, {part}")
        for name, tensor in tensors.items():
            check_finite(f"{part}.{name}", tensor)
        parts.append(tensors)
    step, adam_count = (int(tree[name]) for name in COUNTERS)
    if not 0 <= adam_count <= step:
        raise UserError(f"{source}: step {step} with {adam_count} updates: that cannot be")
    weights, mu, nu = parts
    return TrainingState(weights, mu, nu, step, adam_count)
